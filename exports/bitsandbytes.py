"""The bitsandbytes container: LLM.int8() and NF4 checkpoints, made by transformers and bitsandbytes themselves.

Writing takes the way a user takes: ``from_pretrained(..., quantization_config=BitsAndBytesConfig(...))``, then
``save_pretrained``. A quantized layer ``L`` of shape ``[out, in]`` is then stored

as LLM.int8() (arXiv:2208.07339)::

    L.weight         int8    [out, in]        round(weight * 127 / SCB)
    L.SCB            float32 [out]            the largest magnitude of each row
    L.weight_format  uint8   []               0: rows as they are

as NF4 (arXiv:2305.14314)::

    L.weight         uint8   [out * in / 2, 1]   indices into quant_map, two a byte, the first in the high half
    L.weight.absmax  float32 [out * in / 64]     the largest magnitude of each block of 64 consecutive weights
    L.weight.quant_map                        float32 [16]  the values a weight divided by its absmax may take
    L.weight.quant_state.bitsandbytes__nf4    uint8         JSON: quant_type, blocksize, dtype, shape

    with double quantization absmax is uint8 [out * in / 64], and there are also
    L.weight.nested_absmax                    float32 [out * in / 64 / 256]
    L.weight.nested_quant_map                 float32 [256]
    and nested_offset (the mean of all absmax), nested_blocksize and nested_dtype in the JSON

``config.json`` carries ``quantization_config`` with ``quant_method: bitsandbytes``, the outlier threshold and the layers left
dense. Other tensors keep the checkpoint's type; where these differ, all take the narrowest that holds them all.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exports.base import Artifact, Container, stored_quantization
from exports.packing import to_unsigned
from exports.shards import read_shards, write_shards
from quantize.errors import InputError, one_line
from quantize.grids import Grid, QuantizedTensor, group_index

INT8_GRID = Grid(8, -1, symmetric=True, scale_dtype=torch.float32)
_NF4_STATE = ".weight.quant_state.bitsandbytes__nf4"
_MAX_HALF = torch.finfo(torch.float16).max


def check(name: str, out_features: int, in_features: int, grid: Grid) -> None:
    """Raise :class:`InputError` for a layer that transformers does not hand to bitsandbytes."""
    if ".experts." in name:
        raise InputError(
            f"{name}: transformers keeps a layer's experts in one parameter, which bitsandbytes leaves dense; "
            "use solver.skip=['experts'], or the container gptq for experts"
        )


def write(directory: Path, artifact: Artifact) -> None:
    """Quantize ``artifact.layers`` in transformers and save the model into an existing directory.

    ``artifact.dense`` holds every tensor of the model; ``artifact.options`` the recipe's ``name`` (``llm_int8`` or ``nf4``),
    ``outlier_threshold``, ``double_quant`` and ``device``.

    Raises:
        InputError: the packages are missing or refuse the model, or a layer would not be quantized as asked for.
    """
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.dense.tmp-") as temporary:
        source = Path(temporary)
        dtypes: set[torch.dtype] = set()
        write_shards(source, _watched(artifact, dtypes))
        dtype = next(iter(dtypes))
        for other in dtypes:
            dtype = torch.promote_types(dtype, other)
        config = {key: value for key, value in artifact.config.items() if key != "torch_dtype"}
        (source / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
        model = _quantized_model(source, artifact, dtype)
        _check_layers(model, set(artifact.layers))
        model.save_pretrained(directory)


def _watched(artifact: Artifact, dtypes: set[torch.dtype]) -> Iterator[tuple[str, Tensor]]:
    """The dense tensors, noting their types; what LLM.int8() could not round to float16 is refused."""
    halved = artifact.layers if artifact.options["name"] == "llm_int8" else {}
    for name, tensor in artifact.dense:
        if tensor.is_floating_point():
            dtypes.add(tensor.dtype)
        if name.removesuffix(".weight") in halved and bool((tensor.abs() > _MAX_HALF).any()):
            raise InputError(
                f"{name} holds a weight beyond float16's {_MAX_HALF:.0f}, which LLM.int8() rounds to first; use solver=nf4, or "
                "name the layer in solver.skip"
            )
        yield name, tensor


def _quantized_model(source: Path, artifact: Artifact, dtype: torch.dtype) -> Any:
    _import()
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            quantization_config=_options(artifact, _dense_layers(source, artifact)),
            device_map={"": artifact.options["device"]},
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ImportError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"bitsandbytes does not quantize this model: {one_line(error)}") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if loading["missing_keys"]:
        # Transformers would fill them with random numbers and only warn.
        raise InputError(f"the checkpoint lacks {', '.join(sorted(loading['missing_keys'])[:3])}, which the model needs")
    return model


def _import() -> Any:
    try:
        # It notes that an optional kernel package is absent; nothing here runs a layer.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        import bitsandbytes
    except ImportError as error:
        raise InputError(f"the container bitsandbytes needs the package bitsandbytes ({one_line(error)})") from error
    return bitsandbytes


def _options(artifact: Artifact, dense: list[str]) -> Any:
    """The ``BitsAndBytesConfig``; ``dense`` names the layers to leave as they are."""
    from transformers import BitsAndBytesConfig

    options = artifact.options
    if options["name"] == "llm_int8":
        threshold = float(options["outlier_threshold"])
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold, llm_int8_skip_modules=dense)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=bool(options["double_quant"]),
        llm_int8_skip_modules=dense,
    )


def _dense_layers(source: Path, artifact: Artifact) -> list[str]:
    """Full names of the model's linear layers that are not in ``artifact.layers``, ``lm_head`` among them."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [name for name in names if name not in artifact.layers]


def _check_layers(model: Any, wanted: set[str]) -> None:
    bitsandbytes = _import()
    kinds = (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
    found = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    if found != wanted:
        layer = min(found ^ wanted)
        verb = "left dense" if layer in wanted else "quantized"
        raise InputError(f"bitsandbytes {verb} {layer}, against the recipe; name it in solver.skip or use another container")


def read(directory: Path) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """Read an artifact back, ours or another program's, without bitsandbytes.

    Returns:
        LLM.int8() layers as quantized layers (their grid is int8, symmetric, one scale a row), by name, and all other
        tensors. An NF4 layer's grid is not one of integers: it is among the other tensors as ``L.weight``, decoded to float32
        ``[out, in]`` (for GPT-2's transposed layers too).

    Raises:
        InputError: no bitsandbytes checkpoint, or a layer lacks one of its tensors.
    """
    if stored_quantization(directory).get("quant_method") != "bitsandbytes":
        raise InputError(f"{directory}/config.json does not describe a bitsandbytes checkpoint (quant_method=bitsandbytes)")
    stored = read_shards(directory)
    quantized = {}
    for name in sorted(name for name, tensor in stored.items() if tensor.dtype == torch.int8 and name.endswith(".weight")):
        layer = name.removesuffix(".weight")
        quantized[layer] = _int8_layer(directory, layer, stored)
    for name in sorted(name for name in stored if name.endswith(_NF4_STATE)):
        layer = name.removesuffix(_NF4_STATE)
        parts = {key: stored.pop(key) for key in list(stored) if key.startswith(f"{layer}.weight")}
        try:
            stored[f"{layer}.weight"] = decode_nf4({key.removeprefix(f"{layer}."): part for key, part in parts.items()})
        except KeyError as error:
            raise InputError(f"{directory}: layer {layer} lacks {error.args[0]}; the checkpoint is damaged") from error
    packed = [name for name, tensor in stored.items() if tensor.dtype == torch.uint8]
    if packed:
        raise InputError(f"{directory}: {packed[0]} holds packed codes without their state; the checkpoint is damaged")
    return quantized, stored


def _int8_layer(directory: Path, layer: str, stored: dict[str, Tensor]) -> QuantizedTensor:
    if f"{layer}.SCB" not in stored:
        raise InputError(f"{directory}: layer {layer} lacks SCB; the checkpoint is damaged")
    codes, largest = stored.pop(f"{layer}.weight"), stored.pop(f"{layer}.SCB")
    stored.pop(f"{layer}.weight_format", None)
    return QuantizedTensor(
        codes=to_unsigned(codes),
        scales=(largest / 127)[:, None],
        zeros=torch.full((len(codes), 1), 128, dtype=torch.uint8),
        g_idx=group_index(codes.shape[1], -1),
        grid=INT8_GRID,
    )


def decode_nf4(parts: Mapping[str, Tensor]) -> Tensor:
    """The weight that an NF4 layer's tensors stand for, float32 ``[out, in]`` (arXiv:2305.14314, eq. 5 and 6).

    Args:
        parts: the stored tensors by name without the layer's: ``weight``, ``weight.absmax`` and so on, as listed above.

    Raises:
        KeyError: one of them is missing.
    """
    state = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()))
    absmax = parts["weight.absmax"]
    if "nested_offset" in state:
        scales = parts["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(absmax)]
        absmax = parts["weight.nested_quant_map"][absmax.long()] * scales + state["nested_offset"]
    packed = parts["weight"].view(torch.uint8).flatten().long()
    count = torch.Size(state["shape"]).numel()
    values = parts["weight.quant_map"][torch.stack([packed >> 4, packed & 15], 1).flatten()[:count]]
    return (values * absmax.repeat_interleave(state["blocksize"])[:count]).view(state["shape"])


CONTAINER = Container(quantized=True, check=check, write=write, read=read)
