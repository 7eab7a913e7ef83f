"""Rotary scalings, rolling windows and attention sinks, against transformers where it has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from inference.attention_naive import NaiveAttention
from inference.attention_tiled import TiledAttention
from inference.context import Uncached
from inference.engine import Engine
from inference.load import LoadOptions, load
from inference.model import Model
from inference.rope import Rope, inverse_frequencies, rotate
from inference.window import RollingCache
from quantize.errors import InputError

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-options": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
TEXT = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()


def config_with(rope: dict[str, Any], positions: int = 64) -> LlamaConfig:
    """A tiny model with this scaling."""
    return LlamaConfig(**SIZES, max_position_embeddings=positions, rope_parameters={"rope_theta": 10000.0, **rope})


@pytest.mark.parametrize("name", SCALINGS)
def test_one_position_has_the_rows_of_its_sequences_end(name: str) -> None:
    rope = Rope({"rope_theta": 10000.0, "max_position_embeddings": 16, **SCALINGS[name]}, 16, 64, torch.float32)
    for position in (0, 15, 16, 40):
        # A sequence's last token: what length it ends is what `dynamic` goes by.
        rows = rope.rows(torch.arange(position + 1), [position + 1])
        for row, wanted in zip(rope.row(position), rows, strict=True):
            assert torch.equal(row, wanted[-1])


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaled_rope_gives_transformers_logits(name: str, tmp_path: Path, make_checkpoint: Any) -> None:
    # Dynamic scaling starts behind the trained length: of 16 here.
    path = make_checkpoint(tmp_path / "scaled", config_with(SCALINGS[name], 16 if name == "dynamic" else 64))
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = load(path, LoadOptions(max_tokens=64))
    with torch.inference_mode():
        wanted = reference(torch.tensor([TEXT])).logits[0]
        found = model.forward(torch.tensor(TEXT), Uncached([len(TEXT)]))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    new = reference.generate(torch.tensor([TEXT[:10]]), max_new_tokens=20, do_sample=False, pad_token_id=1, eos_token_id=None)
    engine = Engine(model, 64)
    token, made = int(engine.prefill(TEXT[:10]).argmax()), []
    for _ in range(20):
        made.append(token)
        token = int(engine.decode(token).argmax())
    assert made == new[0, 10:].tolist()


@given(st.sampled_from([*SCALINGS]), st.sampled_from([8, 32, 64, 128]), st.sampled_from([1e4, 5e5]), st.floats(1, 32))
def test_frequencies_are_transformers(name: str, head_dim: int, theta: float, factor: float) -> None:
    rope = {**SCALINGS[name], "factor": factor, "rope_theta": theta}
    rope = {key: value for key, value in rope.items() if not (name == "yarn-options" and key == "truncate")}
    config = LlamaConfig(**{**SIZES, "head_dim": head_dim}, max_position_embeddings=64, rope_parameters=dict(rope))
    wanted, magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"), seq_len=None)
    found, ours = inverse_frequencies({**rope, "max_position_embeddings": 64}, head_dim)
    torch.testing.assert_close(found, wanted, atol=0, rtol=2e-5)
    assert ours == pytest.approx(magnitude)


def test_a_scaling_can_be_given_on_load(tmp_path: Path, make_checkpoint: Any) -> None:
    path = make_checkpoint(tmp_path / "plain", config_with({"rope_type": "default"}))
    plain = Engine(load(path), 64).prefill(TEXT)
    stretched = load(path, LoadOptions(rope={"rope_type": "linear", "factor": 2.0}, max_tokens=128))
    assert stretched.config.max_tokens == 128
    assert float((Engine(stretched).prefill(TEXT) - plain).abs().max()) > 1e-3
    with pytest.raises(InputError, match="max_tokens=0 is no context"):
        load(path, LoadOptions(max_tokens=0))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    """A model with a window of 8."""
    config = MistralConfig(**SIZES, sliding_window=8, max_position_embeddings=64, head_dim=16)
    path: Path = make_checkpoint(tmp_path_factory.mktemp("window") / "mistral", config)
    return path


@pytest.mark.parametrize("kernel", [None, NaiveAttention(), TiledAttention(5, 3)])
def test_a_rolling_window_is_transformers(mistral: Path, kernel: NaiveAttention | TiledAttention | None) -> None:
    reference = AutoModelForCausalLM.from_pretrained(mistral, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        wanted = reference(torch.tensor([TEXT]), use_cache=False).logits[0]
    model = load(mistral)
    options: dict[str, Any] = {} if kernel is None else {"attention": kernel}
    cache = RollingCache(model.config, model.rope, max_tokens=64, **options)
    for sizes in ([1] * 40, [40], [3, 1, 10, 1, 1, 8, 7, 9], [8, 8, 24]):
        cache.reset()
        found, start = [], 0
        with torch.inference_mode():
            for size in sizes:
                found.append(model.forward(torch.tensor(TEXT[start : start + size]), cache.context([size])))
                start += size
        torch.testing.assert_close(torch.cat(found), wanted, atol=1e-4, rtol=0)
    assert cache.nbytes() == 2 * 2 * 2 * 8 * 16 * 4


class Streaming:
    """StreamingLLM as its paper words it: keys are kept unrotated, and get their positions within the cache for each query."""

    def __init__(self, rope: Rope, sinks: int, window: int) -> None:
        self._rope, self._sinks, self._window = rope, sinks, window
        self._keys: list[list[Tensor]] = [[], []]
        self._values: list[list[Tensor]] = [[], []]
        self.counts: Sequence[int] = [1]
        self.positions = torch.tensor([0])

    def _turned(self, x: Tensor, distance: int) -> Tensor:
        cosine, sine = self._rope.turns(torch.tensor([abs(distance)]))
        return rotate(x, cosine, sine if distance >= 0 else -sine)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._keys[layer].append(self._turned(keys, -int(self.positions)))
        self._values[layer].append(values)

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        length = len(self._keys[layer])
        held = [place for place in range(length) if place < self._sinks or place >= length - self._window]
        keys = torch.cat([self._turned(self._keys[layer][place], order) for order, place in enumerate(held)])
        values = torch.cat([self._values[layer][place] for place in held])
        turned = self._turned(queries, len(held) - 1 - int(self.positions))
        return NaiveAttention()(turned, keys.transpose(0, 1), values.transpose(0, 1))

    def advance(self) -> None:
        self.positions = self.positions + 1


@pytest.fixture(scope="module", params=["default", "yarn"])
def streamed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Model:
    """A model whose context is 16 tokens."""
    rope = SCALINGS.get(request.param, {"rope_type": "default"})
    return load(make_checkpoint(tmp_path_factory.mktemp("sinks") / request.param, config_with(rope, 16)))


@given(st.integers(1, 4), st.integers(1, 10), st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=12)
def test_sinks_are_streaming_llm(streamed: Model, sinks: int, window: int, sizes: list[int]) -> None:
    text = (TEXT + TEXT)[: sum(sizes)]
    cache = RollingCache(streamed.config, streamed.rope, window, sinks, max_tokens=64)
    plain = Streaming(streamed.rope, sinks, window)
    with torch.inference_mode():
        wanted = torch.cat([streamed.forward(torch.tensor([token]), plain) for token in text])
        parts = torch.tensor(text).split(sizes)  # type: ignore[no-untyped-call]
        found = torch.cat([streamed.forward(part, cache.context([len(part)])) for part in parts])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_a_window_that_holds_the_text_is_full_attention(streamed: Model) -> None:
    cache = RollingCache(streamed.config, streamed.rope, 12, 4, max_tokens=64)
    engine = Engine(streamed, cache=cache)
    torch.testing.assert_close(engine.prefill(TEXT[:16]), Engine(streamed, 16).prefill(TEXT[:16]), atol=1e-5, rtol=0)
    assert engine.max_tokens == 64
    for token in TEXT[16:]:
        engine.decode(token)
    assert cache.length == 40
    assert cache.held().tolist() == [0, 1, 2, 3, *range(28, 40)]


def test_bad_windows_are_refused(streamed: Model, mistral: Path) -> None:
    with pytest.raises(InputError, match="window=None keeps no token, and the config names no sliding_window"):
        RollingCache(streamed.config, streamed.rope)
    with pytest.raises(InputError, match="sinks=-1"):
        RollingCache(streamed.config, streamed.rope, 8, -1)
    dynamic = load(mistral, LoadOptions(rope={"rope_type": "dynamic", "factor": 2.0}))
    with pytest.raises(InputError, match="use another rope_type than dynamic"):
        RollingCache(dynamic.config, dynamic.rope, 8, 4)
    cache = RollingCache(streamed.config, streamed.rope, 8, max_tokens=20)
    with pytest.raises(InputError, match=r"0 \+ 21 tokens are beyond max_tokens=20"):
        cache.context([21])
    with pytest.raises(InputError, match="holds one sequence, not 2"):
        cache.context([1, 1])
