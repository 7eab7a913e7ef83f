"""Transformers and bitsandbytes as the consumer of LLM.int8() and NF4 artifacts.

What bitsandbytes computes in, and why evaluation is sound:

* ``Linear8bitLt`` rounds its inputs to float16 to code them, multiplies int8 by int8 exactly, and adds the outlier columns in
  the type of the input. That rounding and the coding are the method and stay; everything around them is widened to float32.
* ``Linear4bit`` decodes its weight to the type of the input and multiplies in it. On a processor with AVX512-BF16, however, it
  repacks the weight when it first runs, rounds the scales to bfloat16 and multiplies in bfloat16. That would blur the
  comparison of variants, so evaluation takes the plain path, in float32.
"""

from __future__ import annotations

import dataclasses
import logging
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from eval.consumers import transformers_model
from eval.consumers.base import Consumer, LoadedArtifact
from eval.consumers.transformers_model import ENVIRONMENT, TransformersArtifact
from quantize.errors import InputError, one_line


def load(directory: Path, device: str) -> TransformersArtifact:
    """Load an artifact the way a user of transformers does, weights in the types they are stored in.

    Raises:
        InputError: transformers refuses it, a layer lacks its scales, or bitsandbytes is not installed.
    """
    # Below errors it says of every call that float32 inputs are rounded to float16: see above.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError(f"loading a bitsandbytes checkpoint needs bitsandbytes ({one_line(error)})") from error
    loaded = transformers_model.load(directory, device)
    for name, module in loaded.model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            complete = module.weight.dtype == torch.int8 and module.weight.SCB is not None
        elif isinstance(module, bitsandbytes.nn.Linear4bit):
            state = getattr(module.weight, "quant_state", None)
            # Scales that are codes themselves need scales of their own.
            complete = state is not None and (state.nested or state.absmax.is_floating_point())
        else:
            continue
        if not complete:
            # bitsandbytes would quantize the codes as if they were weights, and only the figures would tell.
            raise InputError(f"{directory}: layer {name} lacks the scales of its codes; make the artifact again")
    return dataclasses.replace(loaded, consumer=f"{loaded.consumer} + bitsandbytes {metadata.version('bitsandbytes')}")


def for_evaluation(loaded: LoadedArtifact) -> LoadedArtifact:
    """The same model, with everything outside the codes in float32 and 4-bit layers on the float32 path."""
    import bitsandbytes

    widened = transformers_model.for_evaluation(loaded)
    assert isinstance(widened, TransformersArtifact)
    for module in widened.model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            _compute_in_float32(module)
    return widened


def _compute_in_float32(module: Any) -> None:
    module.support_avx512bf16_for_cpu = False
    module.compute_dtype = torch.float32
    module.compute_type_is_set = True


CONSUMER = Consumer(load=load, for_evaluation=for_evaluation, environment=ENVIRONMENT)
