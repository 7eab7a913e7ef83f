"""``gate``: the limits that an artifact's figures are held against. None of them is set unless a recipe or a command sets it.

Limits are maxima but for ``top1_agreement`` and ``decode_ratio``; docs/gate.md says what each of the figures is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import II, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from quantize.errors import InputError, one_line

PRESETS = Path(__file__).resolve().parent.parent / "recipes" / "gate"
DIVERGENCES = ("kld_mean", "kld_p99", "top1_agreement")  # limits on what eval.divergence measures
# For each limit what it may be, and a value that works.
_RANGES: dict[str, tuple[float, float, str]] = {
    "ppl_ratio": (0, math.inf, "1.05"),
    "kld_mean": (0, math.inf, "0.05"),
    "kld_p99": (0, math.inf, "0.5"),
    "top1_agreement": (0, 1, "0.9"),
    "task_drop": (0, 1, "0.02"),
    "size_bytes": (1, math.inf, "100000000"),
    "size_ratio": (0, math.inf, "0.5"),
    "peak_rss_bytes": (1, math.inf, "2000000000"),
    "peak_rss_ratio": (0, math.inf, "1.1"),
    "decode_ratio": (0, math.inf, "0.9"),
}


@dataclass
class GateConfig:
    """``gate``: limits of every variant but the unquantized one; null is no limit."""

    ppl_ratio: float | None = None  # at most: perplexity over the baseline's
    kld_mean: float | None = None  # at most: divergence from the baseline, nats a token
    kld_p99: float | None = None  # at most: 99 % of the tokens lie below
    top1_agreement: float | None = None  # at least: share of tokens, 0 to 1
    # At most, for each task: score lost (0.02: two points), where it is beyond noise.
    task_drop: dict[str, float] = field(default_factory=dict)
    size_bytes: int | None = None  # at most: weight files
    size_ratio: float | None = None  # at most: over the baseline's
    peak_rss_bytes: int | None = None  # at most: the consumer's process while it loads
    peak_rss_ratio: float | None = None  # at most: over the baseline's
    decode_ratio: float | None = None  # at least: tokens a second over the baseline's


@dataclass
class VariantGateConfig(GateConfig):
    """A variant's limits: whatever it does not set comes from the top-level ``gate``."""

    ppl_ratio: float | None = II("gate.ppl_ratio")
    kld_mean: float | None = II("gate.kld_mean")
    kld_p99: float | None = II("gate.kld_p99")
    top1_agreement: float | None = II("gate.top1_agreement")
    task_drop: dict[str, float] = II("gate.task_drop")
    size_bytes: int | None = II("gate.size_bytes")
    size_ratio: float | None = II("gate.size_ratio")
    peak_rss_bytes: int | None = II("gate.peak_rss_bytes")
    peak_rss_ratio: float | None = II("gate.peak_rss_ratio")
    decode_ratio: float | None = II("gate.decode_ratio")


def check_limits(key: str, limits: GateConfig) -> None:
    """Refuse limits that no figure can be held against.

    Raises:
        InputError: names the key below ``key``, what was found, what is allowed and a value that works.
    """
    for name, value in set_limits(limits).items():
        low, high, example = _RANGES[name]
        each = value if isinstance(value, Mapping) else {"": value}
        for task, number in each.items():
            place = f"{key}.{name}.{task}" if task else f"{key}.{name}"
            if not low <= number <= high or not math.isfinite(number):
                allowed = f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} and more"
                raise InputError(f"{place}={number} cannot be a limit, which is {allowed}; use {example}, or null for none")


def set_limits(limits: GateConfig) -> dict[str, Any]:
    """The limits that are set, by name, in their order; an empty ``task_drop`` is none."""
    values = {each.name: getattr(limits, each.name) for each in fields(GateConfig)}
    return {name: value for name, value in values.items() if value is not None and value != {}}


def read_limits(given: Sequence[str]) -> GateConfig:
    """Limits from a command line: presets' names, YAML files and ``key=value``, later ones over earlier ones.

    Args:
        given: ``strict``, ``standard``, ``loose`` or another file in ``recipes/gate``; ``FILE.yaml``, with the keys at its top
            or below ``gate``; ``kld_mean=0.05``, ``task_drop.builtin=0.02``.

    Raises:
        InputError: a file is missing or no YAML, a key is unknown, or a value is impossible.
    """
    merged: Any = OmegaConf.structured(GateConfig)
    for text in given:
        try:
            merged = OmegaConf.merge(merged, _parsed(text))
        except OmegaConfBaseException as error:
            known = ", ".join(each.name for each in fields(GateConfig))
            raise InputError(f"--limits {text}: {one_line(error).split(' full_key:')[0]}; known are {known}") from error
    limits = OmegaConf.to_object(merged)
    assert isinstance(limits, GateConfig)
    check_limits("gate", limits)
    return limits


def presets() -> list[str]:
    """Names of the limits that come with the project."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def _parsed(text: str) -> Any:
    if "=" in text and not Path(text).is_file():
        return OmegaConf.from_dotlist([text])
    path = PRESETS / f"{text}.yaml" if text in presets() else Path(text)
    if not path.is_file():
        known = ", ".join(presets()) or "none"
        raise InputError(f"--limits {text} is no file and no preset ({known}); give one, or key=value such as kld_mean=0.05")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--limits {path} is no YAML file ({one_line(error)}); write lines such as kld_mean: 0.05") from error
    if isinstance(found, dict) and set(found) == {"gate"}:
        found = found["gate"]
    if not isinstance(found, dict):
        raise InputError(f"--limits {path} holds {type(found).__name__} and no keys; write lines such as kld_mean: 0.05")
    return OmegaConf.create(found)
