"""Taking back the scales that a solver folded into a block, so that its layers fit into the unquantized model again.

AWQ and SmoothQuant divide a norm's weight by scales and multiply the columns of the layers behind it by them, and likewise the
rows of one linear layer and the columns of the next (:mod:`quantize.folding`, :mod:`quantize.linear_folding`). Behind a norm
the scales are what its stored weight says, exactly. Between linear layers they are stored nowhere: each row of the earlier
layer tells its own by least squares, and what that misjudges is put on the later layer's columns, so that their product is the
artifact's. They are taken for scales only if rows and columns agree on them; a layer on a worse grid, or a damaged one, does
not change its neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantize.blocks import Arguments, DecoderWalk
from quantize.folding import find_norms
from quantize.groups import find_groups
from quantize.linear_folding import find_links

_SPREAD = 0.02  # standard deviation of log scales below which nothing was scaled
_AGREEMENT = 0.8  # correlation of what rows and columns say


def unfold(
    block: nn.Module,
    prefix: str,
    hidden: Tensor,
    arguments: Arguments,
    stored: DecoderWalk,
    weights: dict[str, Tensor],
    originals: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The weights of a block's layers as they would be without scales.

    Args:
        block: the unquantized block.
        prefix: of its layers' full names.
        hidden: one window of what enters it, ``[1, tokens, hidden]``.
        arguments: its other arguments.
        stored: the artifact.
        weights: the artifact's layers by full name, float32 ``[out_features, in_features]``.
        originals: the unquantized model's, likewise.
    """
    result = dict(weights)
    norms = [name for name, parameter in block.named_parameters() if parameter.dim() == 1]
    if not differing_from(block, prefix, stored, norms) and not any(
        bool(_fit(weights[name], originals[name]).log().std() > _SPREAD) for name in weights if len(weights[name]) > 1
    ):
        return result
    groups = find_groups(block, [hidden], arguments)
    for first, norm in find_norms(block, groups, hidden, arguments, lambda _: torch.float32).items():
        now = stored.parameter(f"{prefix}{norm.name}.weight") + norm.offset
        factors = now / (norm.weight + norm.offset)
        group = next(group for group in groups if group[0] == first)
        if bool(torch.isfinite(factors).all()) and bool((factors != 1).any()):
            for name in (prefix + member for member in group if prefix + member in result):
                result[name] = result[name] * factors
    for link in find_links(block, groups, hidden, arguments):
        source, target = prefix + link.source, prefix + link.target
        if source in result and target in result:
            _unlink(result, originals, source, target, link.channels)
    return result


def _unlink(result: dict[str, Tensor], originals: dict[str, Tensor], source: str, target: str, channels: Tensor) -> None:
    """Move what the source's rows were divided by back from the target's columns, where both say the same."""
    rows = _fit(result[source], originals[source])
    columns = _fit(result[target].t(), originals[target].t())
    used = rows[channels]
    if not agree(used.log(), -columns.log()):
        return
    factors = torch.ones_like(rows)
    factors[channels] = used
    result[source] = result[source] * factors[:, None]
    result[target] = result[target] / used


def _fit(changed: Tensor, original: Tensor) -> Tensor:
    """For each row the factor that brings ``changed`` nearest to ``original``, positive; 1 where no such factor does."""
    factors = (changed * original).sum(1) / changed.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(factors > 0, factors, torch.ones_like(factors))


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether two estimates of log scales vary, and vary together."""
    pair = torch.stack([one, other]).double()
    if len(one) < 2 or bool((pair.std(1) < _SPREAD).any()):
        return False
    return bool(torch.corrcoef(pair)[0, 1] > _AGREEMENT)


def differing_from(block: nn.Module, prefix: str, stored: DecoderWalk, names: Sequence[str]) -> list[str]:
    """Those of a block's parameters ``names`` whose values are not the artifact's, compared in float32."""
    return [name for name in names if not torch.equal(block.get_parameter(name).float(), stored.parameter(prefix + name))]
