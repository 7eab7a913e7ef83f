"""Shared fixtures: a tiny real tokenizer and tiny random checkpoints, made on the spot; nothing is downloaded."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import pydoc_data.topics
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

settings.register_profile("quantize", deadline=None)
settings.load_profile("quantize")

VOCABULARY = 300

MakeCheckpoint = Callable[..., Path]
MakeInt8 = Callable[..., Path]
Cli = Callable[..., tuple[int, str, str]]
RunRecipe = Callable[..., Path]
CloseExpert = Callable[[Path, int], None]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with 300 tokens, trained on Python's own help texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    topics = pydoc_data.topics.topics
    tokenizer.train_from_iterator((topics[name] for name in sorted(topics)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=2048
    )


@pytest.fixture(scope="session")
def make_checkpoint() -> MakeCheckpoint:
    """``make_checkpoint(path, config, dtype=float16, seed=0, **options)``: a random model saved as safetensors.

    Every parameter gets noise, so that no bias is zero and no norm weight one: forgetting to load any of them shows.
    ``options`` go to ``save_pretrained`` (``max_shard_size`` for shards).
    """

    def make(
        path: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float16, seed: int = 0, **options: object
    ) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        model.to(dtype).save_pretrained(path, **options)
        return path

    return make


@pytest.fixture(scope="session")
def close_expert() -> CloseExpert:
    """``close_expert(path, number)``: change a checkpoint's routers so that no token ever goes to expert ``number`` above 3.

    It must hold a single file and send each token to two experts. Of a row and its negative one gives a positive logit: two
    such pairs leave a row of zeros no place.
    """

    def close(path: Path, number: int) -> None:
        stored = load_file(path / "model.safetensors")
        for name, router in stored.items():
            if name.endswith(".gate.weight"):
                router[1], router[3], router[number] = -router[0], -router[2], 0
        save_file(stored, path / "model.safetensors", metadata={"format": "pt"})

    return close


@pytest.fixture(scope="session")
def tiny_llama(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A random FP16 Llama of four blocks with grouped-query attention, tied embeddings and a tokenizer. Read it only."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    make_checkpoint(path, config)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def run_recipe() -> RunRecipe:
    """``run_recipe(folder, recipe, "key=value", ..., code=0)``: run a recipe's text in this process below ``folder``.

    Gives the run's directory, ``folder / "run"``; the exit code must be ``code``. A second call goes on with that run.
    """

    def run(folder: Path, recipe: str, *arguments: str, code: int = 0) -> Path:
        from quantize.__main__ import main

        (folder / "recipe").mkdir(exist_ok=True)
        (folder / "recipe" / "tried.yaml").write_text(recipe)
        places = [f"--config-dir={folder}", "recipe=tried", f"output_dir={folder / 'run'}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["quantize", *places, *arguments])
            patch.setattr(logging.getLogger(), "handlers", [])
            patch.setenv("HYDRA_FULL_ERROR", "1")
            assert main() == code
        return folder / "run"

    return run


@pytest.fixture(scope="session")
def moe_config() -> Callable[..., PretrainedConfig]:
    """``moe_config(**changes)``: a tiny Qwen3-MoE of two blocks with four experts, two for each token."""

    def make(**changes: Any) -> PretrainedConfig:
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 2048,
        }
        return Qwen3MoeConfig(**{**sizes, **changes})

    return make


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """``cli("key=value", ...)``: exit code, standard output, standard error."""
    from quantize.__main__ import main

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quantize", *arguments])
        code = main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def small_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a run of a few seconds."""
    text = tmp_path_factory.mktemp("text") / "assignment.txt"
    text.write_text(pydoc_data.topics.topics["assignment"])
    return [
        f"model.path={tiny_llama}",
        "calibration.num_samples=4",
        "calibration.seq_len=32",
        "solver.group_size=32",
        "quality=fast",
        "eval.windows=2",
        "eval.seq_len=64",
        f"eval.text={text}",
        "eval.tasks=[]",
    ]


@pytest.fixture
def auto_gptq(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    """A function that gives the module ``auto_gptq.PACKAGE.MODULE`` without running any ``__init__``.

    Skips the test where AutoGPTQ is not installed.
    """
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # called at the end of every layer
    return _load


def _load(package: str, module: str) -> Any:
    spec = importlib.util.find_spec("auto_gptq")
    if spec is None or spec.origin is None:
        pytest.skip("needs AutoGPTQ: `make test-reference`, or pip install -e '.[reference]'")
    alias = f"auto_gptq_{package.replace('.', '_')}"
    if alias not in sys.modules:
        stand_in = types.ModuleType(alias)
        stand_in.__path__ = [str(Path(spec.origin).parent.joinpath(*package.split(".")))]
        sys.modules[alias] = stand_in
    return importlib.import_module(f"{alias}.{module}")


@pytest.fixture
def auto_awq() -> Callable[[str], Any]:
    """A function that gives one of AutoAWQ's modules by its full name, without running any ``__init__``.

    Skips the test where AutoAWQ is not installed.
    """
    return _load_awq


_AWQ_PACKAGES = ("awq", "awq.utils", "awq.quantize", "awq.modules", "awq.modules.linear")


def _load_awq(module: str) -> Any:
    spec = importlib.util.find_spec("awq") if "awq" not in sys.modules else sys.modules["awq"].__spec__
    if spec is None or spec.origin is None:
        pytest.skip("needs AutoAWQ: `make test-reference`, or pip install -e '.[reference]'")
    root = Path(spec.origin).parent
    for name in _AWQ_PACKAGES:
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name].__spec__ = spec if name == "awq" else None
    if module == "awq.quantize.quantizer":
        # What it imports of the other kernels and of folding, beside which transformers 5 lacks a class, is not called.
        linear, scale = sys.modules["awq.modules.linear"], types.ModuleType("awq.quantize.scale")
        for name in ("GEMM", "GEMV", "Marlin", "GEMVFast"):
            linear.__dict__[f"WQLinear_{name}"] = None
        scale.__dict__.update(apply_scale=None, apply_clip=None)
        sys.modules["awq.quantize.scale"] = scale
    return importlib.import_module(module)


_SYMMETRIC = {"num_bits": 8, "type": "int", "symmetric": True}
_ACTIVATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "dynamic": {**_SYMMETRIC, "dynamic": True, "strategy": "token"},
    "static": {**_SYMMETRIC, "dynamic": False, "strategy": "tensor"},
}


@pytest.fixture(scope="session")
def make_int8() -> MakeInt8:
    """``make_int8(dense, path, activations, group_size=-1, input_scale=0.05)``: round a directory's linear layers to int8.

    ``activations`` is one of ``none``, ``dynamic``, ``static``; scales are float32. Made by hand, with no code of the
    project, in the layout that compressed-tensors reads.
    """
    return _write_int8


def _write_int8(dense: Path, path: Path, activations: str, group_size: int = -1, input_scale: float = 0.05) -> Path:
    stored = load_file(dense / "model.safetensors")
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        weight = stored[name].float()
        grouped = weight.view(weight.shape[0], -1, weight.shape[1] if group_size == -1 else group_size)
        scale = grouped.abs().amax(-1, keepdim=True) / 127.5
        layer = name.removesuffix(".weight")
        stored[name] = (grouped / scale).round().clamp(-128, 127).to(torch.int8).view(weight.shape)
        stored[f"{layer}.weight_scale"] = scale[..., 0].contiguous()
        if activations == "static":
            stored[f"{layer}.input_scale"] = torch.tensor([input_scale])
    config = json.loads((dense / "config.json").read_text())
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                # Without a format of the group's own, the package expects W8A16 to be packed, whatever the general one says.
                "format": "int-quantized",
                "weights": {**_SYMMETRIC, "dynamic": False, **strategy},
                "input_activations": _ACTIVATIONS[activations],
            }
        },
    }
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    for side in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (dense / side).exists():
            shutil.copy(dense / side, path / side)
    return path
