"""Every file that is written, run by llama.cpp: it continues a prompt as transformers does.

Files of the checkpoint's own numbers (F32, F16) must give the 64 tokens that transformers gives from the F16 file, a BF16 file
those that it gives from that file. llama.cpp rounds a quantized layer's inputs to 8 bits and transformers does not, so there
the tokens may part where two are about as likely: each that llama.cpp says must be among transformers' best at its place.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eval.consumers.gguf_model import CONSUMER
from eval.consumers.llamacpp_server import generate
from eval.consumers.transformers_model import TransformersArtifact
from eval.llamacpp_tools import TOOLS, find_tool
from exports.gguf_convert import convert
from exports.gguf_mix import FILE_TYPES
from exports.gguf_quantize import Options, quantize_file
from quantize.demo_model import demo_model

PROMPT = "The history of the bridge begins in the nineteenth century, when the city"
COUNT = 64
APART = 0.75  # logits, between transformers' best token and the one that llama.cpp says
DENSE = ("F32", "F16", "BF16")
CALIBRATED = ("q4_0", "q4_1", "q4_k_m")
Cli = Callable[..., tuple[int, str, str]]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(any(find_tool(name) is None for name in TOOLS), reason="needs llama.cpp's tools: `make llamacpp`"),
]


def opened(file: Path) -> TransformersArtifact:
    loaded = CONSUMER.for_evaluation(CONSUMER.load(file.parent, "cpu"))
    assert isinstance(loaded, TransformersArtifact)
    return loaded


@pytest.fixture(scope="module")
def f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("f16") / "model.gguf"
    convert(demo_model(), file, "F16")
    return file


@pytest.fixture(scope="module")
def prompt(f16: Path) -> list[int]:
    return list(opened(f16).tokenizer(PROMPT)["input_ids"])


@torch.no_grad()
def greedy(file: Path, prompt: list[int]) -> list[int]:
    """Transformers' greedy continuation."""
    ids = torch.tensor([prompt])
    said = opened(file).model.generate(ids, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)
    return list(said[0, len(prompt) :].tolist())


@torch.no_grad()
def check_close(file: Path, prompt: list[int]) -> None:
    """Each of llama.cpp's tokens is within ``APART`` of transformers' best at its place, and most are the best."""
    said = generate(file, prompt, COUNT).ids
    assert len(said) == COUNT
    logits = opened(file).logits(torch.tensor([[*prompt, *said]]))[0, len(prompt) - 1 : -1].float()
    below = logits.amax(-1) - logits[torch.arange(COUNT), list(said)]
    same = int((below == 0).sum())
    print(f"{file}: {same} of {COUNT} tokens are transformers' best; others at most {float(below.max()):.3f} below")
    assert float(below.max()) < APART and same > 0.9 * COUNT


@pytest.mark.parametrize("kind", DENSE)
def test_an_unquantized_file_gives_the_same_tokens(kind: str, f16: Path, prompt: list[int], tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    convert(demo_model(), file, kind)
    # 7 bits of mantissa are another model.
    expected = greedy(file if kind == "BF16" else f16, prompt)
    assert list(generate(file, prompt, COUNT).ids) == expected


@pytest.mark.parametrize("kind", [kind for kind in FILE_TYPES if kind not in DENSE])
def test_a_quantized_file_is_continued_alike(kind: str, f16: Path, prompt: list[int], tmp_path: Path) -> None:
    quantize_file(f16, tmp_path / "model.gguf", Options(kind))
    check_close(tmp_path / "model.gguf", prompt)


@pytest.mark.parametrize("grid", CALIBRATED)
def test_a_calibrated_file_is_continued_alike(grid: str, prompt: list[int], tmp_path: Path, cli: Cli) -> None:
    sizes = ["calibration.num_samples=4", "calibration.seq_len=256", "quality=fast", "stages=[load,calibrate,quantize,export]"]
    code, _, err = cli("recipe=gguf_q4_0", f"grid={grid}", *sizes, f"output_dir={tmp_path}")
    assert code == 0, err
    check_close(tmp_path / "variants" / "q4_0" / "model.gguf", prompt)
