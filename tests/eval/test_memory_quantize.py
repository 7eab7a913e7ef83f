"""The memory plan of a quantization against quantizations measured, and its command line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PretrainedConfig

from eval.memory_geometry import load_config
from eval.memory_measure import allocated
from eval.memory_quantize import main, parse, report
from eval.memory_quantize_plan import QuantizationPlan, plan_variant
from quantize.block_files import BlockFiles
from quantize.checkpoint import SafetensorsCheckpoint
from quantize.config import RunConfig
from quantize.errors import InputError
from quantize.files import read_json, write_tensors
from quantize.quantizer import parts_of, quantize_blocks
from quantize.run import Run

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
CALIBRATION = ["calibration.num_samples=8", "calibration.seq_len=64", "calibration.batch_tokens=128"]
MOST = 1.3  # times the measured peak


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Kernels' buffers are one for each thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama", LlamaConfig(**SIZES))


def recipe(path: Path, *arguments: str) -> RunConfig:
    return parse([f"model.path={path}", "memory=1GB", "device=cpu", *CALIBRATION, *arguments]).config


class Held(SafetensorsCheckpoint):
    """A checkpoint whose tensors were read before anything is measured: the mapped file would count as allocated, all of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._held = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}

    def tensor(self, name: str) -> Tensor:
        return self._held[name]

    def release(self) -> None:
        """Nothing is mapped anew."""


def measured(config: RunConfig, name: str, folder: Path) -> int:
    """The peak of bytes that the quantize step allocates on this machine's CPU, to the byte."""
    run = Run(config, folder, str(config.model.path))
    run.checkpoint = Held(Path(run.model_path))
    shape = (config.calibration.num_samples, config.calibration.seq_len)
    windows = torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
    write_tensors(run.work("calibration", "windows.safetensors"), {"windows": windows})
    variant = config.variants[name]

    def work() -> None:
        quantize_blocks(run, variant, BlockFiles(run.work("quantize", name), "", len(parts_of(run, variant))))

    return allocated(work, "cpu")[1]


def planned(config: RunConfig, name: str) -> QuantizationPlan:
    return plan_variant(config, name, load_config(str(config.model.path)), torch.device("cpu"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["recipe=awq"],
        ["recipe=awq", "calibration.activations=disk"],
        ["recipe=awq", "solver.search_loss=module"],
        ["recipe=awq", "solver=awq+gptq"],
        ["recipe=gptq", "quality=fast"],
        ["recipe=gptq", "quality=balanced"],
        ["recipe=gptq", "quality=balanced", "calibration.activations=disk"],
        ["recipe=gptq", "quality=best"],
        ["recipe=gptq", "quality=fast", "solver.static_groups=true"],
        ["recipe=gptq", "quality=fast", "solver.lm_head=true"],
        ["recipe=gptq", "quality=fast", "solver.true_sequential=false"],
        ["recipe=gptq", "quality=fast", "model.compute_dtype=bfloat16"],
        ["recipe=gptq", "solver=rtn"],
        ["recipe=int8", "solver.input_activations=static", "solver.smoothquant=true"],
    ],
    ids=" ".join,
)
def test_the_plan_holds(checkpoint: Path, tmp_path: Path, arguments: list[str]) -> None:
    config = recipe(checkpoint, *arguments)
    (name,) = config.variants
    plan, peak = planned(config, name), measured(config, name, tmp_path)
    assert peak <= plan.peak_bytes <= MOST * peak
