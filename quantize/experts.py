"""Mixture-of-experts layers with one linear layer for each matrix of each expert.

transformers keeps all experts of a layer in two 3-D parameters, checkpoints keep every matrix apart, and a solver needs it
apart: each expert sees only the tokens routed to it. :func:`separate_experts` rebuilds a model's skeleton the way its
checkpoint stores it, so that layers are loaded, quantized and exported under the checkpoint's own names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

# Where a checkpoint keeps the experts of ``LAYER.mlp``, and what it calls gate, up and down projection there.
STORED_AS = (
    ("mlp", ("gate_proj", "up_proj", "down_proj")),  # Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek, GLM-4
    ("block_sparse_moe", ("w1", "w3", "w2")),  # Mixtral, MiniMax
)
# Routers are linear layers in some families and bare parameters in others. They decide which expert a token gets and hold
# less than a thousandth of the weights, so they always stay as they are; so does the gate of Qwen2-MoE's shared expert.
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")


def is_router(layer: str) -> bool:
    """Whether a linear layer's name is that of a router, which is never quantized."""
    return _ROUTER.search(layer) is not None


class _Expert(nn.Module):
    """One expert's three projections, under the checkpoint's names."""

    def __init__(self, hidden: int, inner: int, names: tuple[str, str, str], like: Tensor) -> None:
        super().__init__()
        for name, inputs, outputs in zip(names, (hidden, hidden, inner), (inner, inner, hidden), strict=True):
            self.add_module(name, nn.Linear(inputs, outputs, bias=False, device=like.device, dtype=like.dtype))

    def forward(self, hidden: Tensor, apply_gate: Callable[[Tensor], Tensor]) -> Tensor:
        gate, up, down = self.children()
        # No intermediate result but the product outlives this line: a suspended forward waits at the last projection.
        result: Tensor = down(apply_gate(torch.cat([gate(hidden), up(hidden)], dim=-1)))
        return result


class Experts(nn.Module):
    """Stands in for a fused experts module of transformers: called and computing alike, built of linear layers."""

    def __init__(self, fused: nn.Module, names: tuple[str, str, str]) -> None:
        """Build as many experts as ``fused`` has, without storage where it has none; ``fused`` gives its parameters up.

        Args:
            fused: has parameters ``gate_up_proj`` ``[experts, 2 * inner, hidden]`` and ``down_proj`` ``[experts, hidden,
                inner]``, and transformers' ``_apply_gate``.
            names: the checkpoint's names of gate, up and down projection.
        """
        super().__init__()
        down = fused.get_parameter("down_proj")
        count, hidden, inner = down.shape
        for number in range(count):
            self.add_module(str(number), _Expert(hidden, inner, names, down))
        for name in ("gate_up_proj", "down_proj"):
            fused.register_parameter(name, None)
        self._apply_gate: Callable[[Tensor], Tensor] = fused._apply_gate  # type: ignore[assignment]

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' weighted sum for each token.

        Args:
            hidden: ``[tokens, hidden]``.
            top_k_index: experts of each token, int64 ``[tokens, k]``.
            top_k_weights: the router's weights for them, ``[tokens, k]``.
        """
        total = torch.zeros_like(hidden)
        for number, expert in enumerate(self.children()):
            # An expert without tokens is not run: its layers are not reached.
            if bool((top_k_index == number).any()):
                tokens, choice = torch.where(top_k_index == number)
                weights = top_k_weights[tokens, choice, None]
                total.index_add_(0, tokens, (expert(hidden[tokens], self._apply_gate) * weights).to(total.dtype))
        return total


def separate_experts(model: nn.Module, stored: Collection[str]) -> None:
    """Replace fused experts by :class:`Experts` wherever the tensor names ``stored`` tell that the checkpoint has them apart.

    Only ``model`` changes, none of its classes. Experts that are stored fused, or whose arithmetic is not that of
    :class:`Experts`, are left as they are.
    """
    for path, fused in list(_fused_experts(model)):
        parent, attribute, leaf = path.rpartition(".")[0], *path.rsplit(".", 2)[-2:]
        layer = parent.rpartition(".")[0]
        for stored_as, names in STORED_AS:
            home = f"{layer}.{stored_as}" if attribute == "mlp" else parent
            if f"{home}.{leaf}.0.{names[0]}.weight" in stored:
                model.set_submodule(path, Experts(fused, names))
                if home != parent:
                    _rename(model.get_submodule(layer), attribute, stored_as)
                break


def _fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules made by transformers' experts interface with gate and up stacked, without biases."""
    plain = {"has_gate": True, "is_concatenated": True, "has_bias": False, "is_transposed": False}
    for path, module in model.named_modules():
        if (
            {name for name, _ in module.named_parameters(recurse=False)} == {"gate_up_proj", "down_proj"}
            and all(getattr(module, flag, None) is value for flag, value in plain.items())
            and not getattr(module, "has_post_expert_norm", False)
        ):
            yield path, module


def _rename(module: nn.Module, old: str, new: str) -> None:
    """Register child ``old`` as ``new``; the module's own code still finds it as ``old``."""
    child = module.get_submodule(old)
    delattr(module, old)
    module.add_module(new, child)
    module.__dict__[old] = child  # past nn.Module's registration, so that it is walked once, under the new name
