"""What a solver learns about the inputs of a group of layers while the calibration windows pass."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 512  # columns of a tile of the Hessian's upper triangle
_ROWS = 64  # inputs of each batch that are kept as they are


class Statistics:
    """Statistics of the inputs ``x`` of a group of layers; everything is accumulated in float32.

    The Hessian ``H = 2/n * sum(x x^T)`` (GPTQ, arXiv:2210.17323, section 3.1); where reference inputs are given, the drift
    ``D = 2/n * sum((x_ref - x) x^T)``; and where they are wanted, the largest and the mean ``|x|`` of each column and some of
    the inputs themselves, as single rows and as whole windows.

    Attributes:
        count: the number ``n`` of inputs so far. An expert's layers see only the tokens routed to it, perhaps none.
        windows: kept windows ``[1, tokens, in_features]``, as they came.
    """

    def __init__(self, second_order: bool = True, first_order: bool = False, means: bool = False, windows: int = 0) -> None:
        """Only what is wanted is collected.

        Args:
            second_order: Hessian and drift, which cost a matrix product each.
            first_order: the largest magnitudes, and some of the inputs.
            means: the mean magnitudes.
            windows: how many whole windows, the first of each of the first batches.
        """
        self.count = 0
        self.windows: list[Tensor] = []
        self._second_order, self._first_order = second_order, first_order
        self._wants_means, self._wanted_windows = means, windows
        self._hessian: Tensor | None = None
        self._drift: Tensor | None = None
        self._maxima: Tensor | None = None
        self._magnitudes: Tensor | None = None
        self._rows: list[Tensor] = []

    def add(self, inputs: Tensor, reference: Tensor | None = None) -> None:
        """Add inputs ``[..., in_features]``, each leading index one sample, and the unquantized model's at the same places."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        columns = rows.shape[1]
        if self._second_order:
            self._add_products(rows, None if reference is None else reference.reshape(-1, columns).float())
        if self._first_order:
            maxima = rows.abs().amax(0) if len(rows) else rows.new_zeros(columns)
            self._maxima = maxima if self._maxima is None else torch.maximum(self._maxima, maxima)
            self._rows.append(rows[:: max(1, len(rows) // _ROWS)].clone())
        if self._wants_means:
            total = rows.abs().sum(0)
            self._magnitudes = total if self._magnitudes is None else self._magnitudes + total
        if len(self.windows) < self._wanted_windows and inputs.dim() == 3:
            self.windows.append(inputs[:1].clone())
        self.count += rows.shape[0]

    def _add_products(self, rows: Tensor, reference: Tensor | None) -> None:
        columns = rows.shape[1]
        if self._hessian is None:
            self._hessian = torch.zeros(columns, columns, device=rows.device)
        # A symmetric rank-k update: only tiles on and above the diagonal are computed, each by the matrix product routine.
        for start in range(0, columns, TILE):
            stop = min(start + TILE, columns)
            self._hessian[start:stop, start:].addmm_(rows[:, start:stop].t(), rows[:, start:])
        if reference is not None:
            if self._drift is None:
                self._drift = torch.zeros(columns, columns, device=rows.device)
            self._drift.addmm_((reference - rows).t(), rows)

    def hessian(self) -> Tensor:
        """The Hessian, float32 ``[in_features, in_features]``."""
        if self._hessian is None or not self.count:
            raise ValueError("no inputs were added")
        full = self._hessian * (2.0 / self.count)
        # Mirrored tile by tile: at 7B, one more copy of the largest Hessian is most of a gigabyte.
        for start in range(0, len(full), TILE):
            stop = min(start + TILE, len(full))
            tile = full[start:stop, start:stop]
            tile.copy_(tile.triu() + tile.triu(1).t())
            full[stop:, start:stop] = full[start:stop, stop:].t()
        return full

    def drift(self) -> Tensor | None:
        """The drift, float32 ``[in_features, in_features]``; None where no reference inputs were added."""
        return None if self._drift is None else self._drift * (2.0 / self.count)

    def maxima(self) -> Tensor:
        """The largest magnitude in each column, float32 ``[in_features]``."""
        if self._maxima is None:
            raise ValueError("no inputs were added")
        return self._maxima

    def means(self) -> Tensor:
        """The mean magnitude of each column, float32 ``[in_features]``."""
        if self._magnitudes is None or not self.count:
            raise ValueError("no inputs were added")
        return self._magnitudes / self.count

    def sample(self) -> Tensor:
        """Some of the inputs, evenly spread over those of each batch: float32 ``[rows, in_features]``."""
        return torch.cat(self._rows)
