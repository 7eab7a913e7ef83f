"""Transformers and GPTQModel as the consumer of AWQ checkpoints.

Transformers runs them on GPTQModel's kernels. The plain torch kernel unpacks the codes and multiplies in 16 bits whatever the
type of its input, which rounds the decoded weights as well. That would blur the comparison of variants, so evaluation has the
same unpacking code decode in float32, and multiplies in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from eval.consumers import transformers_model
from eval.consumers.base import Consumer, LoadedArtifact
from eval.consumers.transformers_model import ENVIRONMENT, TransformersArtifact


def for_evaluation(loaded: LoadedArtifact) -> LoadedArtifact:
    """The same model with everything outside the codes in float32, and AWQ layers decoded to float32."""
    from gptqmodel.nn_modules.qlinear import AWQuantLinear

    widened = transformers_model.for_evaluation(loaded)
    assert isinstance(widened, TransformersArtifact)
    for module in widened.model.modules():
        if isinstance(module, AWQuantLinear):
            module.forward = functools.partial(_forward, module)
    return widened


def _forward(module: Any, inputs: Tensor) -> Tensor:
    """The layer's product in float32; ``[..., in_features]`` to ``[..., out_features]``."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    weight = dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), module.bits, module.group_size)
    bias = None if module.bias is None else module.bias.float()
    return torch.nn.functional.linear(inputs.float(), weight.t(), bias)


CONSUMER = Consumer(load=transformers_model.load, for_evaluation=for_evaluation, environment=ENVIRONMENT)
