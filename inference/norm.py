"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467): ``x / sqrt(mean(x^2) + eps) * weight``, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from inference.linear import tensor_bytes


class RMSNorm:
    """One norm over the last dimension.

    ``sqrt(mean(x^2) + eps) = hypot(|x|, sqrt(d * eps)) / sqrt(d)`` takes four small operations where torch's own takes nine,
    which counts at one token; ``sqrt(d)`` goes into the weight.

    Attributes:
        scaled_weight: float32 ``[..., d]``, ``sqrt(d)`` times the weight.
        scaled_eps: ``sqrt(d * eps)``.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        """``weight`` floating, its last dimension ``d`` the one normed over; other dimensions broadcast."""
        size = weight.shape[-1]
        self.scaled_weight: Tensor = weight.float() * size**0.5
        self.scaled_eps = (size * eps) ** 0.5
        self._eps = torch.tensor(self.scaled_eps, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., d]`` in, the same shape and type out."""
        wide = x.float()
        root = torch.hypot(torch.linalg.vector_norm(wide, dim=-1, keepdim=True), self._eps)
        return wide.div(root).mul_(self.scaled_weight).to(x.dtype)

    def nbytes(self) -> int:
        """Bytes of the weight."""
        return tensor_bytes(self.scaled_weight)
