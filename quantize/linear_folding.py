"""Scaling the inputs of a layer that come from another linear layer: v and o, up and down, fc1 and fc2.

Dividing rows of the earlier layer (and its bias) by ``s`` and multiplying the later one's columns by it leaves the block's
function as it is where nothing but a product, a sum over tokens or a ReLU lies between (AWQ, arXiv:2306.00978, section 3.2).
With grouped queries, several heads of the output projection read one head of v; they then share its scales (AutoAWQ leaves
that case out, because the two layers' shapes differ).

Which layers belong together is not listed. Every earlier layer of a fitting width is tried out with scales that differ from
channel to channel, and taken only if the later layer and the block as a whole give what they gave. A gate in front of a SiLU,
or a GELU between two layers (GPT-2, GPT-NeoX, Bloom, Phi), fails that trial: ``gelu(x / s) * s`` is another function.

Both layers are scaled before the block is quantized, by the inputs that the later one has in the block as it still is: by the
time those of the quantized block are seen, the earlier layer's codes are fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantize.blocks import Arguments, linear_layers, linear_shape, linear_weight, set_linear_weight
from quantize.folding import is_close, restored
from quantize.forwards import run_block


@dataclass(frozen=True)
class Link:
    """Two linear layers, the second of which reads channels of the first.

    Attributes:
        source: the earlier layer's name inside the block.
        target: the later one's.
        channels: int64 ``[in_features of target]``: the output of ``source`` that each input comes from.
    """

    source: str
    target: str
    channels: Tensor

    def source_values(self, values: Tensor) -> Tensor:
        """Mean of the target's values ``[in_features]`` over the inputs that share a channel of the source: ``[out_features]``.

        Channels that no input comes from get 1.
        """
        width = int(self.channels.max()) + 1
        counts = torch.bincount(self.channels, minlength=width)
        sums = values.new_zeros(width).index_add_(0, self.channels, values)
        return torch.where(counts > 0, sums / counts.clamp(min=1), torch.ones_like(sums))

    def shared(self, values: Tensor) -> Tensor:
        """The target's values with those that share a channel of the source made equal, ``[in_features]``."""
        return self.source_values(values)[self.channels]


def row_factors(link: Link, scales: Tensor, rows: int) -> Tensor:
    """What the source's rows are multiplied by when the target's columns are multiplied by ``scales``: ``[rows]``."""
    factors = torch.ones(rows, device=scales.device)
    factors[link.channels] = 1 / scales
    return factors


@torch.no_grad()
def find_links(block: nn.Module, groups: Sequence[Sequence[str]], hidden: Tensor, arguments: Arguments) -> list[Link]:
    """Pairs of linear layers between which scales can be moved, in order of execution of the later one.

    Args:
        block: the decoder block.
        groups: from :func:`quantize.groups.find_groups`, in order of execution; only groups of one layer are looked at.
        hidden: hidden states ``[windows, tokens, hidden]`` to try with; one window will do.
        arguments: the block's other arguments.
    """
    layers, found = linear_layers(block), []
    before = _outputs(block, hidden, arguments, list(layers))
    for number, group in enumerate(groups):
        if len(group) != 1 or group[0] not in before:
            continue
        earlier = [name for other in groups[:number] for name in other]
        for link in _candidates(block, group[0], earlier):
            # Any scales do; these differ from channel to channel and are far from 1.
            generator = torch.Generator().manual_seed(0)
            rows = linear_shape(layers[link.source])[0]
            scales = torch.exp2(2 * torch.rand(rows, generator=generator) - 1).to(hidden.device)[link.channels]
            with _scaled(block, link, scales):
                after = _outputs(block, hidden, arguments, [link.target])
            if all(is_close(after[name], before[name]) for name in (link.target, "")):
                found.append(link)
                break
    return found


def _candidates(block: nn.Module, target: str, earlier: Sequence[str]) -> Iterator[Link]:
    """Layers that may feed ``target``, the nearest first, with the channels that each would feed it by."""
    layers = linear_layers(block)
    width = linear_shape(layers[target])[1]
    head_dim = getattr(block.get_submodule(target.rpartition(".")[0]), "head_dim", None)
    device = layers[target].get_parameter("weight").device
    for source in reversed(earlier):
        rows = linear_shape(layers[source])[0]
        if rows >= width:  # more rows: of layers stacked in one, the last is v, or up
            yield Link(source, target, torch.arange(rows - width, rows, device=device))
        elif isinstance(head_dim, int) and width % rows == 0 and rows % head_dim == 0:
            heads = torch.arange(rows, device=device).view(-1, head_dim)
            yield Link(source, target, heads.repeat_interleave(width // rows, dim=0).flatten())


def _outputs(block: nn.Module, hidden: Tensor, arguments: Arguments, names: Sequence[str]) -> dict[str, Tensor]:
    """What layers give for ``hidden``, and under the empty name by how much the block changes it."""
    layers, outputs = linear_layers(block), {}

    def remember(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _, __, output: outputs.update({name: output})

    handles = [layers[name].register_forward_hook(remember(name)) for name in names]
    try:
        outputs[""] = run_block(block, hidden, arguments) - hidden
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def scale_layers(block: nn.Module, link: Link, scales: Tensor) -> None:
    """Divide the source's rows and bias and multiply the target's columns, ``scales`` being ``[in_features of target]``."""
    layers = linear_layers(block)
    source, target = layers[link.source], layers[link.target]
    factors = row_factors(link, scales, linear_shape(source)[0])
    set_linear_weight(source, linear_weight(source).float() * factors[:, None])
    bias = getattr(source, "bias", None)
    if isinstance(bias, Tensor):
        bias.data = (bias.float() * factors).to(bias.dtype)
    set_linear_weight(target, linear_weight(target).float() * scales)


@contextmanager
def _scaled(block: nn.Module, link: Link, scales: Tensor) -> Iterator[None]:
    """The block with the pair scaled; put back afterwards."""
    layers = linear_layers(block)
    with restored([layers[link.source], layers[link.target]]):
        scale_layers(block, link, scales)
        yield
