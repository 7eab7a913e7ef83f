"""Bytes of a quantization, found by running the project's own code on the meta device.

Nothing is computed and nothing is stored, but every tensor has its size and its time of life, as in
:mod:`eval.memory_trace`. Two things are added. Each tensor is told apart by the code that made it, and each moment belongs
to a phase, so that a peak can be said to be made of something. And code that looks at numbers gets an answer: comparisons
hold, nothing is out of bounds, each loss is lower than the one before. So every scale that may be tried is tried and kept, and
nothing is tried a second time because it failed.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from eval.memory_trace import _FusedAttention

EMBEDDING = "embedding of the windows"
SCALES = "choice of scales"
RUNNING = "running a block"
SOLVING = "solving"
TUNING = "tuning"
HEAD = "inputs of the output embedding"

# Whose work a moment is, and what a tensor is: by the innermost function on the stack that is listed, as module:function.
PHASE_NAMES = {
    "group_solver:GroupSolver.solve": SOLVING,
    "quantizer:_BlockStep._solve": SOLVING,
    "quantizer:_PlainSteps.__call__": SOLVING,
    "scaling:scale_block": SCALES,
    "tuning:tune_block": TUNING,
    "quantizer:_CalibratedSteps._head": HEAD,
    "blocks:DecoderWalk._embed": EMBEDDING,
}
HIDDEN = "hidden states"
COPIES = "solver's copies"
KIND_NAMES = {
    "blocks:DecoderWalk.loaded_block": "block weights",
    "blocks:set_linear_weight": "block weights",
    "quantizer:_BlockStep._solve": "block weights",
    "blocks:DecoderWalk.weight": "weights in float32",
    "scaling:Scaling.weight": "weights in float32",
    "blocks:DecoderWalk._recording": "embeddings",
    "blocks:DecoderWalk.block_arguments": "masks and positions",
    "statistics:": "Hessians and statistics",
    "forwards:run_block": "activations",
    "owners:Owner": "activations",
    "awq:solve": COPIES,
    "awq:clipped_params": COPIES,
    "awq:_Clip": COPIES,
    "awq:hessian_blocks": COPIES,
    "awq:": "candidates",
    "smoothing:": "candidates",
    "folding:fold_norm": "block weights",
    "linear_folding:scale_layers": "block weights",
    "folding:": "candidates",
    "linear_folding:": "candidates",
    "gptq:": COPIES,
    "rtn:": COPIES,
    "quantizer:_BlockStep._stream": HIDDEN,
    "quantizer:_BlockStep._look": HIDDEN,
    "quantizer:_BlockStep._tune": HIDDEN,
    "quantizer:_CalibratedSteps._head": HIDDEN,
    "blocks:DecoderWalk.block_inputs": HIDDEN,
    "blocks:DecoderWalk.head_inputs": HIDDEN,
    "tuning:_Weight": "tuned weights",
    "tuning:": "gradients and optimizer",
    "group_solver:": COPIES,
}
OTHER = "other"
CODES = "codes"
_UNIT = 512  # bytes: what torch's allocator on CUDA hands out is a multiple of it
_ORDER = (EMBEDDING, SCALES, RUNNING, SOLVING, TUNING, HEAD)
# Searches whose slices are alike and let go of one after another: a few stand for all.
ALIKE = {"awq:relative_magnitudes", "awq:layer_loss.<locals>.loss"}
_PACKAGE = Path(__file__).resolve().parent.parent / "quantize"
_aten = torch.ops.aten


class LazyBlockDone(Exception):
    """GPTQ has rounded the first of its lazy blocks of columns, and all others are like it."""


@dataclass
class Phase:
    """The most that is alive during one phase: bytes in all, and of each kind at that moment."""

    peak: int
    kinds: dict[str, int]


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is alive on the meta device, which stands for the real one, by phase and kind, while it is entered.

    Attributes:
        phases: the phases so far.
        detail: what the phase at hand is about, such as the layers being solved; part of the phase's name.
        group_size: of the grid; -1: whole rows. Where a tensor's shape depends on numbers, it is the columns of one group.
    """

    def __init__(self, group_size: int, cpu: bool) -> None:
        """Count for a quantization on a CPU, or on another device: there, what is made on the CPU is elsewhere."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._counted = ("meta", "cpu") if cpu else ("meta",)
        self.phases: dict[str, Phase] = {}
        self.detail = ""
        self.group_size = group_size
        self._total = 0
        self._by_kind: Counter[str] = Counter()
        self._alive: dict[int, tuple[str, int, Any]] = {}  # address of a storage: kind, bytes, reference
        self._denied: set[int] = set()  # storages of booleans that are False
        self._floats = 0.0
        self._open = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            return self._answer(args[0])
        result = self._result(func, args, kwargs)
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor) and leaf.device.type in self._counted and self._open:
                self.see(leaf)
        if func is _aten.any.default and result.is_meta:  # the project asks whether any number is out of bounds
            self._denied.add(result.untyped_storage()._cdata)
        return result

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is _aten.bincount.default:
            return args[0].new_empty(max(1, kwargs.get("minlength", args[2] if len(args) > 2 else 0)), dtype=torch.int64)
        if func is _aten.nonzero.default:
            columns = args[0].numel()
            members = columns if self.group_size == -1 else min(self.group_size, columns)
            return args[0].new_empty(members, args[0].dim(), dtype=torch.int64)
        if func is _aten._to_copy.default and args[0].is_meta and str(kwargs.get("device")) == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)

    def _answer(self, tensor: Tensor) -> bool | int | float:
        if _caller(sys._getframe(2)) == "gptq:feed_back":
            raise LazyBlockDone
        if tensor.dtype is torch.bool:
            return tensor.untyped_storage()._cdata not in self._denied
        if not tensor.dtype.is_floating_point:
            return 0
        self._floats -= 1.0
        return self._floats

    def see(self, tensor: Tensor) -> None:
        """Count an operation's result from now on, and the moment with it."""
        if tensor.untyped_storage()._cdata in self._alive:
            return
        phase, kind = _place(sys._getframe(2))
        self.hold(tensor, CODES if kind == COPIES and tensor.dtype is torch.uint8 else kind)
        name = f"{phase} {self.detail}" if phase == SOLVING and self.detail else phase
        if name not in self.phases or self._total > self.phases[name].peak:
            self.phases[name] = Phase(self._total, {kind: size for kind, size in self._by_kind.items() if size})

    def hold(self, tensor: Tensor, kind: str = OTHER) -> None:
        """Count a tensor until it is gone."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, -(-storage.nbytes() // _UNIT) * _UNIT

        def gone(_: Any) -> None:
            kind, size, _ = self._alive.pop(address)
            self._denied.discard(address)
            self._total -= size
            self._by_kind[kind] -= size

        self._alive[address] = (kind, size, weakref.ref(storage, gone))
        self._total += size
        self._by_kind[kind] += size

    def without_storage(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape that does not count."""
        self._open = False
        try:
            return torch.empty_like(tensor)
        finally:
            self._open = True

    def ordered(self) -> dict[str, Phase]:
        """The phases in the order of a block's time, groups of layers as they were solved."""
        position = {kind: number for number, kind in enumerate(_ORDER)}

        def place(name: str) -> int:
            return position[SOLVING] if name.startswith(SOLVING) else position[name]

        return {name: self.phases[name] for name in sorted(self.phases, key=place)}

    def rename(self, tensor: Tensor, kind: str) -> None:
        """From now on a tensor counts as ``kind``."""
        address = tensor.untyped_storage()._cdata
        if address in self._alive:
            old, size, reference = self._alive[address]
            self._alive[address] = (kind, size, reference)
            self._by_kind[old] -= size
            self._by_kind[kind] += size


def _place(frame: FrameType | None) -> tuple[str, str]:
    """The phase and the kind of what is allocated in ``frame``."""
    phase = kind = None
    while frame is not None and (phase is None or kind is None):
        found = _known(frame.f_code)
        if found is not None:
            phase, kind = phase or found[0], kind or found[1]
        frame = frame.f_back
    return phase or RUNNING, kind or OTHER


@functools.cache
def _known(code: CodeType) -> tuple[str | None, str | None] | None:
    name = _name(code)
    phase = next((phase for start, phase in PHASE_NAMES.items() if name.startswith(start)), None)
    kind = next((kind for start, kind in KIND_NAMES.items() if name.startswith(start)), None)
    return None if phase is None and kind is None else (phase, kind)


@functools.cache
def _name(code: CodeType) -> str:
    path = Path(code.co_filename)
    return f"{path.stem}:{code.co_qualname}" if path.is_relative_to(_PACKAGE) else ""


def _caller(frame: FrameType | None) -> str:
    """The innermost function of the project on the stack."""
    while frame is not None:
        if name := _name(frame.f_code):
            return name
        frame = frame.f_back
    return ""


class OnPaper(_FusedAttention):
    """Functions as they are to be followed: attention by its fused kernels, slices of a search by a few of them."""

    def __init__(self, ledger: Ledger, cpu: bool) -> None:
        """Follow functions for ``ledger``; on a CPU attention has buffers for each thread."""
        super().__init__(cpu)
        self._ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and args[1:] == ("meta",):  # how a parameter's storage is dropped
            return self._ledger.without_storage(args[0])
        if func is torch.functional.split and _caller(sys._getframe(1)) in ALIKE:
            return _some(func(*args, **(kwargs or {})))
        if func is nn.functional.scaled_dot_product_attention and any(
            isinstance(value, Tensor) and value.requires_grad for value in args
        ):
            return _trained_attention(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def _some(slices: Sequence[Tensor]) -> Iterable[Tensor]:
    return [*slices[:2], *slices[2:][-1:]]


def _trained_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **options: Any
) -> Tensor:
    """Attention that keeps for its gradient what the fused kernels keep: their inputs, their output, and a number a row."""
    if key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    fused = _aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask)[0]
    return output
