"""How programs run quantized linear layers, as far as memory is concerned: what a layer allocates besides its result.

Each class stands in for a linear layer on the meta device while a prefill is followed, and allocates in the order in which the
kernel it is named after does. Their own tables are weights, which the trace leaves out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantize.blocks import linear_layers, linear_shape
from quantize.experts import is_router


class _Kernel(nn.Module):
    """A layer ``[out, in]`` of type ``dtype`` with ``groups`` groups of ``bits``-bit codes a row."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, bits: int, groups: int) -> None:
        super().__init__()
        self.rows, self.columns, self.dtype, self.bits = rows, columns, dtype, bits
        self.register_buffer("like", torch.empty(0, dtype=dtype, device="meta"))
        self.register_buffer("group", torch.empty(columns, dtype=torch.int64, device="meta"))
        self.register_buffer("scales", torch.empty(groups, rows, dtype=torch.float16, device="meta"))
        self.register_buffer("zeros", torch.empty(groups, rows, dtype=code_dtype(bits), device="meta"))
        # No storage of its own: the product is the same whatever the weight holds.
        self.register_buffer("weight", torch.empty(columns, rows, dtype=dtype, device="meta"))

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, self.columns)
        return self.product(flat).reshape(*hidden.shape[:-1], self.rows)

    def product(self, flat: Tensor) -> Tensor:
        raise NotImplementedError


class TorchKernel(_Kernel):
    """GPTQModel's plain torch kernel (``TorchLinear``): unpacks a layer's codes to integers, then to its whole weight."""

    def product(self, flat: Tensor) -> Tensor:
        codes = torch.bitwise_and(self._shifted(), 2**self.bits - 1)
        scales: Tensor = self.scales[self.group]  # type: ignore[index]
        steps = codes - self.zeros[self.group]  # type: ignore[index]
        # A CPU's product of two types turns the integers into the scales' type first.
        weight = scales * steps.to(scales.dtype)
        del steps, scales
        return torch.matmul(flat, weight.to(flat.dtype))

    def _shifted(self) -> Tensor:
        return torch.empty(self.columns, self.rows, dtype=torch.int32, device="meta").to(code_dtype(self.bits))


class DequantizingKernel(_Kernel):
    """bitsandbytes' 4-bit layer for more than one token: the whole weight in the inputs' type, then a product."""

    def product(self, flat: Tensor) -> Tensor:
        return torch.matmul(flat, flat.new_empty(self.columns, self.rows))


class Int8Kernel(_Kernel):
    """Inputs rounded to int8, one float32 scale a token; the product comes out in the inputs' type (W8A8)."""

    def product(self, flat: Tensor) -> Tensor:
        codes = flat.new_empty(flat.shape, dtype=torch.int8)
        scales = flat.new_empty(len(flat), 1, dtype=torch.float32)
        result = torch.matmul(flat, self.weight)  # type: ignore[arg-type]
        del codes, scales
        return result


class LlmInt8Kernel(_Kernel):
    """bitsandbytes' LLM.int8: as above, with the product in int32 before it is scaled."""

    def product(self, flat: Tensor) -> Tensor:
        codes = flat.new_empty(flat.shape, dtype=torch.int8)
        scales = flat.new_empty(len(flat), dtype=torch.float32)
        product = flat.new_empty(len(flat), self.rows, dtype=torch.int32)
        result = product.to(flat.dtype)
        del codes, scales
        return result


KERNELS: dict[str, Callable[..., nn.Module]] = {
    "gptq-torch": TorchKernel,
    "dequantize": DequantizingKernel,
    "int8": Int8Kernel,
    "llm-int8": LlmInt8Kernel,
}


def code_dtype(bits: int) -> torch.dtype:
    """The type in which GPTQModel's torch kernel keeps unpacked codes."""
    return torch.int16 if bits == 8 else torch.int8


def put_kernels(blocks: nn.Module, kernel: str, dtype: torch.dtype, bits: int, group_size: int) -> None:
    """Replace the linear layers below ``blocks``, but routers, by ``kernel``'s stand-in."""
    for name, module in linear_layers(blocks).items():
        if not is_router(name):
            rows, columns = linear_shape(module)
            groups = 1 if group_size == -1 else -(-columns // group_size)
            blocks.set_submodule(name, _biased(KERNELS[kernel](rows, columns, dtype, bits, groups), module))


def _biased(kernel: nn.Module, module: nn.Module) -> nn.Module:
    """The kernel, adding the layer's bias in place as both packages do."""
    if module.bias is not None:
        kernel.register_buffer("bias", module.bias)  # type: ignore[arg-type]
        kernel.register_forward_hook(lambda this, _, result: result.add_(this.bias))
    return kernel
