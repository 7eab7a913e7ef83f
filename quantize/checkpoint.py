"""Checkpoints: where the weights come from, read lazily, tensor by tensor, from mapped files.

Three sources look alike from here: a Hugging Face directory of safetensors (single or sharded), a GGUF file, and a hub id
(downloaded, then a directory). Opening one reads headers only; :meth:`Checkpoint.tensor` maps one tensor. Pickled weights
(``pytorch_model.bin``) and remote code are refused.
"""

from __future__ import annotations

import json
import re
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from quantize.errors import InputError, one_line
from quantize.files import read_json

WEIGHT_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_CARD_HEAD = re.compile(r"\ufeff?---\n(.*?)\n---\s*\n", re.DOTALL)
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")


class Checkpoint(ABC):
    """An unquantized model on disk.

    Attributes:
        path: the directory or file it was opened from.
        config: the model's configuration, without any quantization entry.
    """

    path: Path
    config: PretrainedConfig

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all stored tensors, sorted."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The type :meth:`tensor` returns: float16, bfloat16 or float32."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """One tensor, in the checkpoint's own type.

        Raises:
            InputError: the tensor's bytes are damaged.
        """

    @abstractmethod
    def weight_files(self) -> list[Path]:
        """The files that hold weights, sorted."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            InputError: the checkpoint has none, or it cannot be read.
        """

    @abstractmethod
    def copy_side_files(self, destination: Path) -> None:
        """Put tokenizer, chat template and generation config into ``destination``."""

    @abstractmethod
    def release(self) -> None:
        """Unmap what has been read so far: touched pages of a mapped file count as this process's memory."""

    def fingerprint_files(self) -> list[Path]:
        """Every file whose bytes decide what this checkpoint is."""
        return self.weight_files()

    def num_parameters(self) -> int:
        """Stored weights, tied ones once."""
        return sum(torch.Size(self.shape(name)).numel() for name in self.names())

    def license(self) -> str | None:
        """The licence the checkpoint names, such as ``apache-2.0``; None where it names none."""
        return None

    def config_dict(self) -> dict[str, Any]:
        """The config as written into exported artifacts."""
        config = self.config.to_diff_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            config.pop(key, None)
        return json.loads(json.dumps(config, default=str))  # type: ignore[no-any-return]


class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face directory with ``config.json`` and safetensors, single or sharded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._raw_config, self.config = _load_config(path)
        self._files = {file: _open_safetensors(file) for file in _weight_files(path)}
        self._owner = {name: file for file, handle in self._files.items() for name in handle.keys()}  # noqa: SIM118
        for name in self._owner:
            kind = self._slice(name).get_dtype()
            if kind not in WEIGHT_DTYPES:
                raise InputError(
                    f"{self._owner[name]}: tensor {name} is {kind}; a checkpoint to quantize holds "
                    f"{', '.join(WEIGHT_DTYPES)} (is this one quantized already?)"
                )

    def release(self) -> None:
        self._files = {file: _open_safetensors(file) for file in self._files}

    def _slice(self, name: str) -> Any:
        return self._files[self._owner[name]].get_slice(name)

    def names(self) -> list[str]:
        return sorted(self._owner)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return WEIGHT_DTYPES[self._slice(name).get_dtype()]

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._owner[name]].get_tensor(name)
        return tensor

    def weight_files(self) -> list[Path]:
        return sorted(self._files)

    def fingerprint_files(self) -> list[Path]:
        side = [self.path / name for name in ("config.json", *SIDE_FILES)]
        return [*self.weight_files(), *(file for file in side if file.exists())]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path, self.path)

    def copy_side_files(self, destination: Path) -> None:
        for name in SIDE_FILES:
            if (self.path / name).exists():
                shutil.copyfile(self.path / name, destination / name)

    def license(self) -> str | None:
        for stated in (_card(self.path / "README.md").get("license"), self._raw_config.get("license")):
            if isinstance(stated, str) and stated.strip():
                return stated.strip()
        return None

    def config_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self._raw_config.items() if key != "quantization_config"}


def open_checkpoint(path: str) -> Checkpoint:
    """Open ``model.path``: a directory, a ``.gguf`` file, or a hub id ``owner/name[@revision]``.

    Raises:
        InputError: nothing there, or what is there is not a readable, unquantized checkpoint.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return SafetensorsCheckpoint(local)
    if local.is_file():
        if local.suffix == ".gguf":
            from quantize.gguf_checkpoint import GgufCheckpoint

            return GgufCheckpoint(local)
        raise InputError(f"model.path={path} is a file but not a .gguf file; give its directory, or a .gguf file")
    match = _HUB_ID.fullmatch(path)
    if match:
        return SafetensorsCheckpoint(_download(match["repo"], match["revision"]))
    raise InputError(f"model.path={path} does not exist; give a model directory, a .gguf file or a hub id like owner/name")


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"],
                # Mistral repositories hold every weight a second time under this name.
                ignore_patterns=["consolidated*", "original/*", "*/*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model.path={repo} is no local path, and the hub did not give it ({type(error).__name__}); check the name, "
            "your network and your access (HF_TOKEN), or give a local directory"
        ) from error


def _load_config(path: Path) -> tuple[dict[str, Any], PretrainedConfig]:
    if not (path / "config.json").exists():
        raise InputError(f"{path} has no config.json; model.path must be a Hugging Face model directory")
    raw = _read_object(path / "config.json")
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise InputError(f"{path} is quantized already ({method}); give the FP16, BF16 or FP32 checkpoint it was made from")
    if "model_type" not in raw:
        raise InputError(f"{path}/config.json has no model_type; it is not a transformers model")
    try:
        return raw, AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # config classes check their values by whatever their arithmetic raises
        raise InputError(f"{path}/config.json: model_type={raw['model_type']!r} is not usable ({one_line(error)})") from error


def _card(file: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; empty where there is none that can be read."""
    try:
        head = _CARD_HEAD.match(file.read_text(encoding="utf-8"))
        found = yaml.safe_load(head[1]) if head else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}  # a card is prose for people: what is wrong with it stops nobody
    return found if isinstance(found, dict) else {}


def _read_object(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict):
        raise InputError(f"{file} holds no JSON object but {type(value).__name__}; it is damaged: fetch it again")
    return value


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
            raise InputError(f"{index} has no weight_map; the index is damaged: fetch it again")
        files = [path / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if file.parent != path:
                raise InputError(f"{index} names {file.name} outside its own directory; the index is not trustworthy")
            if not file.exists():
                raise InputError(f"{file} is named by {index.name} but is not on disk; fetch the missing shard")
        return files
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    if any(path.glob("pytorch_model*.bin")):
        raise InputError(f"{path} holds pickled weights (pytorch_model.bin), which are never loaded; save it as safetensors")
    raise InputError(f"{path} has neither model.safetensors nor model.safetensors.index.json")


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is truncated or corrupted ({one_line(error)}); fetch it again") from error


def load_tokenizer(path: Path, named: Path, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in directory ``path``; errors name ``named``."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise InputError(f"{named} has no usable tokenizer ({one_line(error)}); put its tokenizer files there") from error
