"""How much the model's predictions suffer when one layer is rounded to fewer bits.

Rounding a layer moves its output by ``d``. To second order that changes the predictions of a token by the Kullback-Leibler
divergence ``1/2 d^T F d``, with ``F`` the Fisher information of the predictions about that output (Kunstner et al. 2019,
arXiv:1905.12558, section 2). Of ``F`` the diagonal is taken: the mean squared gradient of ``log p(y)``, where ``y`` is drawn
from the model's own predictions. Of ``d`` the mean square of each output is what the Hessian ``H = 2/n sum x x^T`` gives,
``1/2 (dW H dW^T)_ii``. So the estimate for a layer is ``1/2 sum_i F_ii (1/2 dW H dW^T)_ii``: one backward pass serves all
layers and all candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from quantize.blocks import linear_layers
from quantize.forwards import run_block
from quantize.swapping import SwapBench

_CHUNK = 128  # tokens whose logits are in memory at once


def output_errors(change: Tensor, hessian: Tensor) -> Tensor:
    """Mean squared error of each output, ``[out_features]``.

    Args:
        change: of the weight, float32 ``[out_features, in_features]``.
        hessian: ``2/n sum x x^T``, float32 ``[in_features, in_features]``.
    """
    return ((change @ hessian) * change).sum(1).clamp(min=0) / 2


def predicted_divergence(fisher: Tensor, errors: Tensor) -> float:
    """The divergence in nats a token, of a layer's Fisher information and mean squared output errors ``[out_features]``."""
    return float((fisher.double() * errors.double()).sum() / 2)


def fisher_information(bench: SwapBench, seed: int) -> dict[str, Tensor]:
    """The diagonal of the Fisher information about each linear layer's output, by full name: float32 ``[out_features]``.

    Squared gradients are summed over the tokens that reach a layer and divided by all tokens, so that an expert counts as often
    as it is used. Layers that no token reaches are left out.

    Args:
        bench: the model and what enters its blocks.
        seed: of the draws from its predictions.
    """
    walk, found = bench.walk, {}
    gradient = _gradient_behind_blocks(bench, torch.Generator(device=walk.device).manual_seed(seed))
    tokens = gradient.shape[0] * gradient.shape[1]
    for index in reversed(range(walk.count)):
        with walk.loaded_block(index) as block:
            gradient, squares = _backward(bench, index, block, gradient)
        prefix = f"{walk.path}.{index}."
        found.update({prefix + name: total / tokens for name, total in squares.items()})
    return found


def _gradient_behind_blocks(bench: SwapBench, generator: torch.Generator) -> Tensor:
    """The gradient of the log probability of tokens drawn from the predictions, for what leaves the last block."""
    final = bench.states[-1]
    gradient = torch.empty_like(final)
    with bench.walk.logits() as logits, torch.enable_grad():
        for window, part in _chunks(final):
            hidden = final[window, part].detach()[None].requires_grad_()
            log_p = torch.log_softmax(logits(hidden)[0].float(), -1)
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            (gradient[window, part],) = torch.autograd.grad(log_p.gather(1, drawn).sum(), hidden)
    return gradient


def _chunks(hidden: Tensor) -> Iterator[tuple[int, slice]]:
    windows, tokens = hidden.shape[:2]
    return ((window, slice(start, start + _CHUNK)) for window in range(windows) for start in range(0, tokens, _CHUNK))


def _backward(bench: SwapBench, index: int, block: nn.Module, gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Take the gradient through one block: that of its input, and each linear layer's sum of squares ``[out_features]``."""
    entering, squares = torch.empty_like(gradient), dict[str, Tensor]()
    outputs: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, __, output: outputs.update({name: output})

    handles = [layer.register_forward_hook(remember(name)) for name, layer in linear_layers(block).items()]
    try:
        for window in range(len(gradient)):
            outputs.clear()
            with torch.enable_grad():
                hidden = bench.states[index][window : window + 1].detach().requires_grad_()
                result = run_block(block, hidden, bench.arguments[index])
                wanted = [hidden, *outputs.values()]
                found = torch.autograd.grad(result, wanted, gradient[window : window + 1], allow_unused=True)
            entering[window] = found[0][0]
            _add_squares(squares, dict(zip(outputs, found[1:], strict=True)))
    finally:
        for handle in handles:
            handle.remove()
    return entering, squares


def _add_squares(squares: dict[str, Tensor], gradients: Mapping[str, Tensor | None]) -> None:
    for name, gradient in gradients.items():
        if gradient is not None and gradient.numel():
            total = gradient.reshape(-1, gradient.shape[-1]).float().square().sum(0)
            squares[name] = squares[name] + total if name in squares else total
