"""The block walk: one decoder block in memory at a time, with the activations that reach it.

A :class:`DecoderWalk` builds the model's skeleton without weights, runs its embedding part once to catch what enters block
0, and then takes the blocks in order: load block ``i``, let a solver quantize its linear layers, keep what comes out as the
input of block ``i + 1``, drop the weights. Peak memory is one block plus activations, whatever the model's size.

Linear layers that read the same tensor (q, k and v; gate and up) form a *group* and share one Hessian. Groups are found by
running the block once and watching which layers see the same input, in order of execution, so nothing here needs to know
an architecture's layer names. See :mod:`quantize.forwards` for how a block is run while its layers change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from quantize.checkpoint import Checkpoint
from quantize.errors import InputError, one_line
from quantize.experts import separate_experts

# Where transformers' decoder families keep their blocks. A family not listed is found by its shape.
BLOCK_PATHS = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "phi",
            "phi3",
            "granite",
            "olmo2",
            "smollm3",
            "qwen2_moe",
            "qwen3_moe",
            "olmoe",
            "mixtral",
        ),
        "model.layers",
    ),
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "falcon": "transformer.h",
    "bloom": "transformer.h",
}


# Names of old checkpoints that transformers changes as it loads them.
RENAMED = {"embed_out.weight": "lm_head.weight"}  # GPT-NeoX

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with besides the hidden states


class _StopWalk(Exception):
    """Ends the embedding pass: the arguments of every block have been seen."""


class _WrongReturn(Exception):
    """The model did not hand one block's result to the next as it was returned."""


class _Recorder:
    """Stands in for every block of a model: passes the hidden states on and notes what each block is called with."""

    def __init__(self, count: int, as_tuple: bool) -> None:
        self._count, self._as_tuple = count, as_tuple
        self.hidden: Tensor
        self.arguments: list[Arguments] = []

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.arguments and hidden is not self.hidden:
            raise _WrongReturn
        self.hidden = hidden
        self.arguments.append((args, kwargs))
        if len(self.arguments) == self._count:
            raise _StopWalk
        return (hidden,) if self._as_tuple else hidden


class DecoderWalk:
    """Gives access to a checkpoint's decoder blocks, one at a time.

    Attributes:
        count: number of decoder blocks.
        path: module path of the block list, such as ``model.layers``.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        """Build the skeleton; no weights are read.

        Raises:
            InputError: the family's blocks cannot be found.
        """
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        try:
            # Buffers (rotary frequencies) are computed for real, parameters stay without storage.
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(checkpoint.config, dtype=dtype, trust_remote_code=False)
        except ValueError as error:
            raise InputError(f"{checkpoint.path}: no causal language model can be built ({one_line(error)})") from error
        self._as_tuple: bool | None = None  # whether a block's result is a tuple; seen when the model first runs
        self._stored = set(checkpoint.names())
        separate_experts(model, self._stored)
        self._model = model.eval().requires_grad_(False)
        self.path = BLOCK_PATHS.get(checkpoint.config.model_type) or find_block_path(self._model)
        self._blocks: nn.ModuleList = self._model.get_submodule(self.path)
        self.count = len(self._blocks)
        self._prefix = f"{self._model.base_model_prefix}."
        self._parameters = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        for module in self._model.modules():
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    def canonical(self, stored_name: str) -> str:
        """The name the model class gives a stored tensor (GPT-2 checkpoints, for one, omit ``transformer.``)."""
        if RENAMED.get(stored_name) in self._parameters:
            return RENAMED[stored_name]
        if stored_name in self._parameters or self._prefix + stored_name not in self._parameters:
            return stored_name
        return self._prefix + stored_name

    def _load(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        name = self._stored_name(parameter)
        tensor = self.checkpoint.tensor(name)
        if tensor.shape != self._model.get_parameter(parameter).shape:
            raise InputError(
                f"{self.checkpoint.path}: tensor {name} is {tuple(tensor.shape)}, but by the config it is "
                f"{tuple(self._model.get_parameter(parameter).shape)}; they belong to different models"
            )
        return tensor.to(self.device, dtype or self.dtype)

    def _names(self, parameter: str) -> tuple[str, ...]:
        """Names a checkpoint may have for a parameter."""
        others = (old for old, new in RENAMED.items() if new == parameter)
        return parameter, parameter.removeprefix(self._prefix), self._prefix + parameter, *others

    def _stored_name(self, parameter: str) -> str:
        for name in self._names(parameter):
            if name in self._stored:
                return name
        if self.tied and parameter in (f"{layer}.weight" for layer in self.head()):
            return self._stored_name(f"{self.embedding()}.weight")
        raise InputError(
            f"{self.checkpoint.path} has no tensor {parameter}, which a {self.checkpoint.config.model_type} model needs; "
            "the checkpoint is incomplete or of another family"
        )

    def layer_names(self, index: int) -> dict[str, tuple[int, int]]:
        """Linear layers of block ``index``: full name to ``(out_features, in_features)``, in definition order."""
        prefix = f"{self.path}.{index}."
        return {prefix + name: linear_shape(module) for name, module in linear_layers(self._blocks[index]).items()}

    def head(self) -> dict[str, tuple[int, int]]:
        """The output embedding (``lm_head``), as :meth:`layer_names` gives the layers of a block."""
        module = self._model.get_output_embeddings()
        return {self._name_of(module): linear_shape(module)}

    def embedding(self) -> str:
        """The name of the input embedding."""
        return self._name_of(self._model.get_input_embeddings())

    def _name_of(self, module: nn.Module) -> str:
        name: str = next(name for name, child in self._model.named_modules() if child is module)
        return name

    @property
    def tied(self) -> bool:
        """Whether the output embedding is the input embedding's matrix."""
        return bool(self.checkpoint.config.get_text_config().tie_word_embeddings)

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """The type a parameter has in the checkpoint."""
        return self.checkpoint.dtype(self._stored_name(parameter))

    def parameter(self, name: str) -> Tensor:
        """Any parameter as it is stored, in float32, by the name the model class gives it."""
        return self._load(name, torch.float32)

    def weight(self, layer: str) -> Tensor:
        """A linear layer's weight from the checkpoint, float32 ``[out_features, in_features]`` (Conv1D: transposed)."""
        weight = self._load(f"{layer}.weight", torch.float32)
        return weight.t() if isinstance(self._model.get_submodule(layer), Conv1D) else weight

    @contextlib.contextmanager
    def loaded_block(self, index: int) -> Iterator[nn.Module]:
        """Block ``index`` with its weights on the device; they are dropped afterwards."""
        block = self._blocks[index]
        for module_name, module in block.named_modules():
            prefix = ".".join(filter(None, (self.path, str(index), module_name)))
            for name in module._parameters:
                if module._parameters[name] is not None:
                    module._parameters[name] = nn.Parameter(self._load(f"{prefix}.{name}"), requires_grad=False)
        try:
            yield block
        finally:
            # Buffers (rotary tables, causal masks) were computed with the skeleton and must outlive this visit.
            for module in block.modules():
                _drop(module)
            self.checkpoint.release()

    @torch.no_grad()
    def block_inputs(self, windows: Tensor) -> Tensor:
        """What enters block 0 for token windows ``[batch, tokens]``: hidden states ``[batch, tokens, hidden]``."""
        return self._embed(windows)[0]

    @torch.no_grad()
    def block_arguments(self, tokens: int) -> list[Arguments]:
        """The other arguments each block is called with (masks, rotary tables), for windows of ``tokens``.

        They do not depend on the token ids, and their batch dimension is 1, so they serve every batch.
        """
        return self._embed(torch.zeros(1, tokens, dtype=torch.int64))[1]

    @torch.no_grad()
    def head_inputs(self, hidden: Tensor) -> Tensor:
        """What reaches the output embedding when ``hidden`` ``[batch, tokens, hidden]`` leaves the last block."""
        seen: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _StopWalk

        hidden = hidden.to(self.device)
        if self._as_tuple is None:
            self._embed(torch.zeros(1, 1, dtype=torch.int64))
        with self._recording(lambda *_, **__: (hidden,) if self._as_tuple else hidden):
            handle = self._model.get_output_embeddings().register_forward_pre_hook(stop, prepend=True)
            try:
                self._model(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device), use_cache=False)
            except _StopWalk:
                return seen[-1]
            finally:
                handle.remove()
        raise InputError(f"{type(self._model).__name__} does not use its output embedding; solver.lm_head cannot be used")

    @contextlib.contextmanager
    def logits(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from what leaves the last block, ``[batch, tokens, hidden]``, to logits ``[batch, tokens, vocabulary]``.

        What lies behind the blocks looks at each token alone, so any cut of the tokens will do. Inside, no block can be run.
        """
        if self._as_tuple is None:
            self._embed(torch.zeros(1, 1, dtype=torch.int64))
        current: list[Tensor] = []
        with self._recording(lambda *_, **__: (current[-1],) if self._as_tuple else current[-1]):

            def logits(hidden: Tensor) -> Tensor:
                current[:] = [hidden.to(self.device)]
                ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
                result: Tensor = self._model(input_ids=ids, use_cache=False).logits
                return result

            yield logits

    def _embed(self, windows: Tensor) -> tuple[Tensor, list[Arguments]]:
        # Families differ in whether a block returns its hidden states bare or as a tuple's first item.
        for as_tuple in (False, True):
            recorder = _Recorder(self.count, as_tuple)
            with self._recording(recorder):
                try:
                    self._model(input_ids=windows.to(self.device), use_cache=False)
                except _StopWalk:
                    self._as_tuple = as_tuple
                    return recorder.hidden, recorder.arguments
                except _WrongReturn:
                    continue
        raise InputError(
            f"{type(self._model).__name__} changes the hidden states between its decoder blocks, which the block walk "
            "cannot follow; this family is not supported"
        )

    @contextlib.contextmanager
    def _recording(self, record: Callable[..., Any]) -> Iterator[None]:
        """Every block replaced by ``record``, and the modules outside the blocks loaded as they are first called."""
        handles = []
        loaded: list[nn.Module] = []

        def load(name: str, module: nn.Module) -> None:
            for key, value in module._parameters.items():
                if value is not None and value.is_meta:
                    module._parameters[key] = nn.Parameter(self._load(f"{name}.{key}"), requires_grad=False)
            loaded.append(module)

        for name, module in self._model.named_modules():
            if not f"{name}.".startswith(f"{self.path}.") and any(p is not None for p in module._parameters.values()):
                handles.append(module.register_forward_pre_hook(lambda m, _, name=name: load(name, m)))
        for block in self._blocks:
            block.forward = record
        try:
            yield
        finally:
            for block in self._blocks:
                del block.forward
            for handle in handles:
                handle.remove()
            for module in loaded:
                _drop(module)


def _drop(module: nn.Module) -> None:
    """Take away the storage of a module's own parameters."""
    for name, value in module._parameters.items():
        if value is not None:
            module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)


def find_block_path(model: nn.Module) -> str:
    """Find an unknown family's decoder blocks: the largest ModuleList of at least two like modules with linear layers.

    Raises:
        InputError: there is none.
    """
    candidates = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(block) for block in module}) == 1:
            size = sum(parameter.numel() for parameter in module.parameters())
            if all(linear_layers(block) for block in module):
                candidates.append((size, name))
    if not candidates:
        raise InputError(
            f"{type(model).__name__} has no list of identical decoder blocks with linear layers; "
            f"supported families: {', '.join(sorted(BLOCK_PATHS))}, or any model built the same way"
        )
    return str(max(candidates)[1])


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers below ``module`` (``nn.Linear`` and GPT-2's ``Conv1D``), by name, in definition order."""
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)}


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear layer."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def linear_weight(module: nn.Module) -> Tensor:
    """A linear layer's weight, ``[out_features, in_features]``."""
    weight = module.get_parameter("weight")
    return weight.t() if isinstance(module, Conv1D) else weight


def set_linear_weight(module: nn.Module, weight: Tensor) -> None:
    """Put ``weight`` ``[out_features, in_features]`` into a linear layer, keeping the layer's dtype."""
    old: Tensor = module.weight  # type: ignore[assignment]
    new = weight.to(old.device, old.dtype)
    module._parameters["weight"] = nn.Parameter(
        new.t().contiguous() if isinstance(module, Conv1D) else new, requires_grad=False
    )
