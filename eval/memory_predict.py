"""Memory of a model's variants, predicted from its config: weights as stored and as resident, KV cache, activations.

``peak = resident weights + KV cache + activations``, all at prefill; decoding adds a token to the cache and needs less.
Quantized are the linear layers inside the decoder blocks, as this project does it; embeddings and ``lm_head`` stay dense.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from eval.memory_containers import CONTAINERS, VariantSpec, Weights, groups
from eval.memory_geometry import Geometry, block_path, first_blocks, geometry, skeleton, trace
from eval.memory_kernels import code_dtype, put_kernels
from eval.memory_trace import LiveTensor, Trace
from quantize.errors import InputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Elements of a KV cache; of a quantized one the codes alone, its scales add 2 or 4 bytes to each group of them.
KV_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "float8": 1.0, "int8": 1.0, "int4": 0.5}
RUNTIMES = ("packed", "transformers")


@dataclass(frozen=True)
class MemoryPrediction:
    """What a variant needs; sizes in bytes.

    Attributes:
        variant: its name.
        runtime: who runs it, see :class:`Predictor`.
        context: tokens of a sequence.
        batch: sequences.
        parameters: of the model, tied ones once.
        stored: on disk, without the files' headers.
        resident: in memory while the model runs.
        kv_bytes_per_token: what a token adds to the cache of one sequence as long as no sliding window is full.
        kv_bytes: the cache at the end of the prefill.
        activation_bytes: the most that lives besides weights and cache.
        largest: the largest tensors among these activations.
    """

    variant: str
    runtime: str
    context: int
    batch: int
    parameters: int
    stored: Weights
    resident: Weights
    kv_bytes_per_token: int
    kv_bytes: int
    activation_bytes: int
    largest: tuple[LiveTensor, ...]

    @property
    def peak_bytes(self) -> int:
        """Resident weights, cache and activations together."""
        return self.resident.total + self.kv_bytes + self.activation_bytes

    def as_dict(self) -> dict[str, Any]:
        """JSON values: the fields, and ``peak_bytes``, ``stored_bytes`` and ``resident_bytes``."""
        totals = {"stored_bytes": self.stored.total, "resident_bytes": self.resident.total, "peak_bytes": self.peak_bytes}
        return {**dataclasses.asdict(self), **totals}


def predict(config: Any, spec: VariantSpec, context: int, batch: int, **options: Any) -> MemoryPrediction:
    """Predict one variant; ``options`` are those of :class:`Predictor`, which is quicker for several.

    Args:
        config: transformers config of a causal language model.
        spec: the variant.
        context: tokens of a sequence, at least 1.
        batch: sequences, at least 1.

    Raises:
        InputError: no such model can be built, or the variant does not exist for its shapes.
    """
    return Predictor(config, **options).predict(spec, context, batch)


class Predictor:
    """Predicts variants of one model, and remembers what they have in common."""

    def __init__(
        self,
        config: Any,
        *,
        runtime: str = "packed",
        logits: str = "all",
        prefill_chunk: int | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        """Build the model's skeleton.

        Args:
            config: transformers config of a causal language model.
            runtime: ``packed``: kernels that run the codes as stored and caches bounded by their windows, as vLLM does it.
                ``transformers``: this project's consumers on a CPU, which unpack.
            logits: ``all``: of every position, as scoring needs; ``last``: of the last, as generating needs.
            prefill_chunk: tokens of a sequence in one forward; None: the whole context.
            kv_dtype: type of the KV cache, one of ``KV_BYTES``; None: that of the arithmetic.

        Raises:
            InputError: no such model can be built.
        """
        self.geometry: Geometry = geometry(config)
        self.runtime, self._last = runtime, logits == "last"
        self._chunk, self._kv_dtype = prefill_chunk, kv_dtype
        self._models: dict[tuple[Any, ...], torch.nn.Module] = {}
        self._traces: dict[tuple[Any, ...], Trace] = {}

    def predict(self, spec: VariantSpec, context: int, batch: int) -> MemoryPrediction:
        """One variant at ``batch`` sequences of ``context`` tokens.

        Raises:
            InputError: the variant does not exist for the model's shapes.
        """
        dtype = self.dtype(spec)
        element = KV_BYTES[self._kv_dtype or dtype]
        stored = self._stored(spec)
        activations = self._trace(spec, context, batch)
        return MemoryPrediction(
            variant=spec.name,
            runtime=self.runtime,
            context=context,
            batch=batch,
            parameters=self.geometry.parameters,
            stored=stored,
            resident=self._resident(spec, stored),
            kv_bytes_per_token=math.ceil(sum(layer.elements_per_token for layer in self.geometry.cache) * element),
            kv_bytes=self.kv_bytes(spec, context, batch),
            activation_bytes=activations.activation_bytes,
            largest=activations.largest,
        )

    def kv_bytes(self, spec: VariantSpec, context: int, batch: int) -> int:
        """Bytes of the KV cache at the end of the prefill."""
        # transformers slices a sliding layer's cache, and a slice keeps the tensor that it is taken from.
        chunk = (self._chunk or context) if self.runtime == "transformers" else None
        held = sum(layer.elements_per_token * layer.tokens(context, chunk) for layer in self.geometry.cache)
        return math.ceil(held * batch * KV_BYTES[self._kv_dtype or self.dtype(spec)])

    def dtype(self, spec: VariantSpec) -> str:
        """Name of the type of dense tensors and arithmetic: the variant's, else the checkpoint's, else float16."""
        name = spec.dtype or str(self.geometry.config.dtype or "float16").removeprefix("torch.")
        if name not in DTYPES:
            raise InputError(f"dtype={name} is not supported; use one of {', '.join(DTYPES)}")
        return name

    def _stored(self, spec: VariantSpec) -> Weights:
        element = DTYPES[self.dtype(spec)].itemsize
        total = Weights(
            embeddings=(self.geometry.input_embedding + self.geometry.output_embedding) * element,
            dense=self.geometry.rest * element,
        )
        for (rows, columns), count in self.geometry.layers.items():
            total += CONTAINERS[spec.container](spec, rows, columns, element).times(count)
        return total

    def _resident(self, spec: VariantSpec, stored: Weights) -> Weights:
        resident = dataclasses.replace(stored, dense=stored.dense + self.geometry.buffer_bytes)
        if self.runtime != "transformers":
            return resident
        if spec.container in ("int-quantized", "pack-quantized"):  # a CPU computes with the unpacked weight
            return dataclasses.replace(resident, codes=self.geometry.quantized * DTYPES[self.dtype(spec)].itemsize)
        if spec.container == "gptq":
            for (rows, columns), count in self.geometry.layers.items():
                zeros = groups(spec, columns) * rows * code_dtype(spec.bits).itemsize
                shifts = 32 // spec.bits * 4  # a table of shift widths, int32
                resident += Weights(unpacked=zeros + columns * 8, dense=shifts).times(count)
        return resident

    def _trace(self, spec: VariantSpec, context: int, batch: int) -> Trace:
        kernel = self._kernel(spec)
        key = (self.dtype(spec), *((kernel, spec.bits, spec.group_size) if kernel else ()))
        at = (*key, context, batch)
        if at not in self._traces:
            if key not in self._models:
                self._models[key] = self._model(spec, kernel)
            options = {"chunk": self._chunk, "last": self._last, "cpu": self.runtime == "transformers"}
            self._traces[at] = trace(self._models[key], self.geometry.config, context, batch, **options)
        return self._traces[at]

    def _model(self, spec: VariantSpec, kernel: str | None) -> torch.nn.Module:
        dtype = DTYPES[self.dtype(spec)]
        model = skeleton(self.geometry.config, dtype)
        path = block_path(model, self.geometry.config)
        first_blocks(model, self.geometry.config, path)
        if kernel:
            put_kernels(model.get_submodule(path), kernel, dtype, spec.bits, spec.group_size)
        return model

    def _kernel(self, spec: VariantSpec) -> str | None:
        if spec.container == "gptq":
            return "gptq-torch" if self.runtime == "transformers" else None
        if spec.container in ("nf4", "llm-int8"):
            return {"nf4": "dequantize", "llm-int8": "llm-int8"}[spec.container]
        return "int8" if spec.int8_inputs else None
