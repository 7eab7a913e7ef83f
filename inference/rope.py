"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split order of Hugging Face checkpoints.

The pair ``(x[i], x[i + d/2])`` of a head at position ``p`` is turned by the angle ``p * f[i]``, ``f[i] = theta**(-2i/d)``.
Contexts longer than those of the training are reached by other ``f``, one function each below; all give transformers' numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantize.errors import InputError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


class Rope:
    """Cosines and signed sines of positions.

    Attributes:
        relative: a key keeps its angle while its sequence grows, so only distances count (all types but ``dynamic``).
    """

    def __init__(
        self, rope: Mapping[str, Any], head_dim: int, tokens: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        """Make the table.

        Args:
            rope: ``rope_type``, ``rope_theta``, and what the type needs: ``factor``, ``original_max_position_embeddings``, ...
            head_dim: elements of a head, even.
            tokens: positions 0 .. tokens-1 are in the table; :meth:`reserve` makes it longer.
            dtype: of the table.
            device: of the table.

        Raises:
            InputError: another ``rope_type``, or one of its parameters is missing.
        """
        self._rope, self._head_dim, self._dtype, self._device = rope, head_dim, dtype, device
        self._inverse, self._magnitude = inverse_frequencies(rope, head_dim)
        self.relative = rope["rope_type"] != "dynamic"
        self._trained = 0 if self.relative else int(_need(rope, "max_position_embeddings"))
        self._tokens = 0
        self.reserve(tokens)

    def reserve(self, tokens: int) -> None:
        """Have at least ``tokens`` positions in the table."""
        if tokens > self._tokens:
            self._tokens = tokens
            cosine, sine = _table(torch.outer(torch.arange(tokens).float(), self._inverse), self._magnitude)
            self._cosine, self._sine = (part.to(self._device, self._dtype) for part in (cosine, sine))

    def rows(self, positions: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """For :func:`rotate`: cosines and sines ``[total, 1, head_dim]`` of a context's ``positions`` and ``counts``."""
        if not self.relative:
            ends = torch.tensor(counts, device=positions.device).cumsum(0) - 1
            lengths = (positions[ends] + 1).repeat_interleave(torch.tensor(counts, device=positions.device))
            if int(lengths.max()) > self._trained:
                return self._dynamic_rows(positions, lengths)
        return self._cosine[positions], self._sine[positions]

    def row(self, position: int) -> tuple[Tensor, Tensor]:
        """:meth:`rows` of a sequence's last token, ``[1, head_dim]`` each: parts of the table wherever it has them."""
        if not self.relative and position >= self._trained:
            cosine, sine = self._dynamic_rows(torch.tensor([position]), torch.tensor([position + 1]))
            return cosine[0], sine[0]
        return self._cosine[position], self._sine[position]

    def row_in_table(self, position: int) -> tuple[int, int] | None:
        """The addresses of :meth:`row`'s tensors, found without a torch operation; None where they are not in the table."""
        if position >= self._tokens or (not self.relative and position >= self._trained):
            return None
        skipped = position * self._head_dim * self._cosine.itemsize
        return self._cosine.data_ptr() + skipped, self._sine.data_ptr() + skipped

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`rows` that turn and do not lengthen: YaRN's factor is not in them."""
        return self._cosine[positions] / self._magnitude, self._sine[positions] / self._magnitude

    def _dynamic_rows(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """A base for each token's own sequence length; what is within the trained length keeps its own."""
        each = lengths.tolist()
        known = {length: _dynamic(self._rope, self._head_dim, length) for length in set(each)}
        inverse = torch.stack([known[length] for length in each])
        cosine, sine = _table(positions.cpu().float()[:, None] * inverse, 1.0)
        return cosine.to(self._device, self._dtype), sine.to(self._device, self._dtype)


def _table(angles: Tensor, magnitude: float) -> tuple[Tensor, Tensor]:
    """``[n, head_dim / 2]`` angles to ``[n, 1, head_dim]`` cosines and sines, the first half of the sines negative."""
    cosine, sine = angles[:, None].cos() * magnitude, angles[:, None].sin() * magnitude
    return torch.cat((cosine, cosine), -1), torch.cat((-sine, sine), -1)


def inverse_frequencies(rope: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """``f``, float32 ``[head_dim / 2]``, and the factor on cosines and sines, 1 but for YaRN.

    Raises:
        InputError: see :class:`Rope`.
    """
    kind, plain = rope["rope_type"], _frequencies(float(rope["rope_theta"]), head_dim)
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / float(_need(rope, "factor")), 1.0
    if kind == "dynamic":
        _need(rope, "factor")
        return plain, 1.0
    if kind == "llama3":
        return _llama3(plain, rope), 1.0
    if kind == "yarn":
        return _yarn(plain, rope, head_dim)
    raise InputError(f"config.json: rope_type={kind!r} is not supported; the engine has {', '.join(ROPE_TYPES)}")


def _need(rope: Mapping[str, Any], key: str) -> Any:
    if rope.get(key) is None:
        raise InputError(f"config.json: rope_type={rope['rope_type']!r} needs {key} in rope_parameters, such as factor=4.0")
    return rope[key]


def _frequencies(theta: float, head_dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)


def _dynamic(rope: Mapping[str, Any], head_dim: int, length: int) -> Tensor:
    """Dynamic NTK: the base grows with the sequence, so that the longest wave is stretched by as much as it is too long."""
    factor, trained = float(_need(rope, "factor")), int(_need(rope, "max_position_embeddings"))
    stretch = factor * max(length, trained) / trained - (factor - 1)
    return _frequencies(float(rope["rope_theta"]) * stretch ** (head_dim / (head_dim - 2)), head_dim)


def _llama3(inverse: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Llama 3.1's stretch: long wavelengths by ``factor``, short ones not at all, those between in proportion."""
    factor, original = float(_need(rope, "factor")), float(_need(rope, "original_max_position_embeddings"))
    low, high = float(_need(rope, "low_freq_factor")), float(_need(rope, "high_freq_factor"))
    turns = original * inverse / (2 * math.pi)  # full turns within the original context
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * inverse / factor + share * inverse


def _yarn(inverse: Tensor, rope: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071, section 3): as Llama 3's, with the share linear in the dimension instead of
    the wavelength, and attention made sharper (section 3.4) by longer queries and keys."""
    original = float(_need(rope, "original_max_position_embeddings"))
    factor = float(rope.get("factor") or float(_need(rope, "max_position_embeddings")) / original)

    def dimension(turns: float) -> float:
        """The one that makes as many turns within the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(float(rope["rope_theta"])))

    low, high = dimension(float(rope.get("beta_fast") or 32)), dimension(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2).float() - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return inverse / factor * ramp + inverse * (1 - ramp), _yarn_magnitude(rope, factor)


def _yarn_magnitude(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    one, all_dimensions = rope.get("mscale"), rope.get("mscale_all_dim")
    return magnitude(float(one)) / magnitude(float(all_dimensions)) if one and all_dimensions else magnitude(1.0)


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn ``heads`` ``[tokens, heads, head_dim]`` by the table's rows ``[tokens, 1, head_dim]`` of their positions."""
    # roll by half a head swaps the two halves; the sign of the swap is in the table.
    return torch.addcmul(heads * cosine, heads.roll(heads.shape[-1] // 2, -1), sine)
