"""GGUF files in transformers: what it computes is what the file says, and what it would fill with random numbers is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from eval.consumers.gguf_model import CONSUMER
from quantize.errors import InputError

PROMPT = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_logits_are_the_original_models(
    tiny_gguf: Path, tiny_llama: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A file of the same name in the current directory is another one.
    (tmp_path / tiny_gguf.name).write_bytes(b"GGUF of another model")
    monkeypatch.chdir(tmp_path)
    loaded = CONSUMER.for_evaluation(CONSUMER.load(tiny_gguf.parent, "cpu"))
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()(PROMPT, use_cache=False).logits
    found = loaded.logits(PROMPT)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert loaded.compute_dtype == "float32" and loaded.max_tokens == 2048
    assert loaded.consumer.startswith("transformers ") and " + gguf " in loaded.consumer
    text = "Statements assign 12 values,\n\tand names."
    assert loaded.tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]


def test_a_directory_holds_one_file(tiny_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"exactly one \.gguf file, such as model\.gguf; found none"):
        CONSUMER.load(tmp_path, "cpu")
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(tiny_gguf, tmp_path / name)
    with pytest.raises(InputError, match=r"found a\.gguf, b\.gguf"):
        CONSUMER.load(tmp_path, "cpu")


def test_a_missing_tensor_is_named(incomplete_gguf: Path) -> None:
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        CONSUMER.load(incomplete_gguf.parent, "cpu")


@pytest.mark.parametrize("share", [0.001, 0.3, 0.99])
def test_half_a_file_is_refused(tiny_gguf: Path, tmp_path: Path, share: float) -> None:
    whole = tiny_gguf.read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"model\.gguf"):
        CONSUMER.load(tmp_path, "cpu")
