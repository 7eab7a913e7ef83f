"""GPTQModel's own loader, for GPTQ and AWQ checkpoints that transformers cannot load by itself.

Optimum puts the same kernel on the same bits everywhere inside the decoder blocks. Checkpoints with several grids
(``dynamic``), a quantized ``lm_head`` or mixture-of-experts layers need GPTQModel itself; vLLM reads the same fields.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from exports.shards import INDEX_FILE, SINGLE_FILE
from quantize.errors import InputError, one_line


def needed(directory: Path, quantization: dict[str, Any]) -> bool:
    """Whether transformers alone would misread the GPTQ or AWQ checkpoint in ``directory``."""
    mixed = any(not pattern.startswith("-:") for pattern in quantization.get("dynamic") or {})
    return mixed or bool(quantization.get("lm_head")) or _has_experts(directory)


def _has_experts(directory: Path) -> bool:
    if (directory / INDEX_FILE).exists():
        names = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
    elif (directory / SINGLE_FILE).exists():
        with (directory / SINGLE_FILE).open("rb") as file:
            names = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    else:
        return False
    return any(re.search(r"\bexperts\.\d+\..*\.qweight$", name) for name in names)


def load(directory: Path, device: str, method: str = "gptq") -> Any:
    """The transformers model inside GPTQModel's wrapper, on its plain torch kernel, in float16.

    Raises:
        InputError: GPTQModel is not installed or refuses the checkpoint.
    """
    try:
        from gptqmodel import BACKEND, GPTQModel
    except ImportError as error:
        raise InputError(f"loading this {method.upper()} checkpoint needs gptqmodel ({one_line(error)})") from error
    try:
        # Its default on CPU is bfloat16, which loses three bits of the scales.
        wrapper = GPTQModel.load(
            str(directory),
            backend=BACKEND[f"{method.upper()}_TORCH"],
            device=device,
            dtype=torch.float16,
            trust_remote_code=False,
        )
    except (ImportError, ValueError, OSError, KeyError, RuntimeError, NotImplementedError, TypeError) as error:
        raise InputError(f"GPTQModel does not load {directory}: {one_line(error)}") from error
    return wrapper.model
