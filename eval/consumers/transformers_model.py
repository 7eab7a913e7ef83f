"""Transformers as the consumer: dense directories as they are, GPTQ checkpoints through optimum and GPTQModel, and
compressed-tensors checkpoints through the package of that name.

GPTQ layers run on GPTQModel's plain torch kernel, which unpacks the codes and multiplies in the type of its input. It is
chosen over the faster CPU kernel because that one computes in bfloat16 and would blur the comparison of variants.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from eval.consumers import gptqmodel_loader
from eval.consumers.base import Consumer, LoadedArtifact
from quantize.errors import InputError, one_line
from quantize.files import read_json

ENVIRONMENT = {
    # GPTQModel compiles its torch kernel, once for each layer: minutes of compiling for seconds of arithmetic.
    "TORCHDYNAMO_DISABLE": "1",
    # Without a bound, GPTQModel starts more CPU workers than small machines survive.
    "GPTQMODEL_CPU_WORKERS": "2",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, kw_only=True)
class TransformersArtifact(LoadedArtifact):
    """A loaded artifact that keeps transformers' own model object at hand."""

    model: Any


def load(directory: Path, device: str) -> TransformersArtifact:
    """Load an artifact the way a user of transformers does, weights in the types they are stored in.

    Raises:
        InputError: transformers refuses it, it lacks weights, or the packages its format needs are not installed.
    """
    from transformers import AutoTokenizer

    config_file = directory / "config.json"
    if not config_file.exists():
        raise InputError(f"{directory} is no model directory: it has no config.json")
    quantization = read_json(config_file).get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method in ("gptq", "awq") and gptqmodel_loader.needed(directory, quantization):
        model, packages = gptqmodel_loader.load(directory, device, method), ["gptqmodel"]
    else:
        model, packages = _from_pretrained(directory, device, quantization)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"transformers does not load the tokenizer in {directory}: {one_line(error)}") from error
    model = model.eval()
    return TransformersArtifact(
        consumer=" + ".join(f"{name} {metadata.version(name)}" for name in packages),
        tokenizer=tokenizer,
        compute_dtype=str(model.dtype).removeprefix("torch."),
        max_tokens=getattr(model.config, "max_position_embeddings", None) or 2**31,
        **functions_of(model),
        model=model,
    )


def _from_pretrained(directory: Path, device: str, quantization: dict[str, Any]) -> tuple[Any, list[str]]:
    """The model, and the packages that took part."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    method, options = quantization.get("quant_method"), {}
    packages = ["transformers"]
    if method == "gptq":
        options["quantization_config"] = _gptq_backend(quantization)
        packages.append("gptqmodel")
    elif method == "awq":
        options["quantization_config"] = _awq_backend(quantization)
        packages.append("gptqmodel")
    elif method == "compressed-tensors":
        _need_compressed_tensors()
        packages.append("compressed-tensors")
        weights = [group["weights"] for group in quantization["config_groups"].values()]
        if not all(kind["symmetric"] for kind in weights):
            if len({(kind["num_bits"], kind.get("group_size")) for kind in weights}) > 1:
                # Its loader takes the first group's bits for every layer, and says nothing.
                raise InputError(
                    f"transformers misreads {directory}, which has layers on several grids with zero points; make it with "
                    "solver.symmetric=true"
                )
            # Otherwise compressed-tensors expects zero points that are not packed, and its own files' are.
            options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "the config's quantization_config will be used": it is the same one
            model, loading = AutoModelForCausalLM.from_pretrained(
                directory, dtype="auto", device_map={"": device}, local_files_only=True, output_loading_info=True, **options
            )
    except (ImportError, ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"transformers does not load {directory}: {one_line(error)}") from error
    if loading["missing_keys"]:
        # Transformers would fill them with random numbers and only warn.
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise InputError(f"{directory} lacks {len(loading['missing_keys'])} tensors, such as {missing}; make it again")
    return model, packages


def for_evaluation(loaded: LoadedArtifact) -> LoadedArtifact:
    """The same model with all 16-bit tensors widened to float32, which is exact; codes stay packed.

    compressed-tensors unpacks a layer's codes on the model's first forward, in the type of the scales, which is float32 then.
    """
    assert isinstance(loaded, TransformersArtifact)
    # PreTrainedModel.float refuses quantized models; their scales are plain buffers, and widening them loses nothing.
    nn.Module.float(loaded.model)
    return TransformersArtifact(
        consumer=loaded.consumer,
        tokenizer=loaded.tokenizer,
        compute_dtype="float32",
        max_tokens=loaded.max_tokens,
        **functions_of(loaded.model),
        model=loaded.model,
    )


def functions_of(model: Any) -> dict[str, Any]:
    """``logits`` of a transformers model, and ``hidden``, ``head`` and ``head_weight`` as far as it has them apart."""

    @torch.inference_mode()
    def logits(token_ids: Tensor) -> Tensor:
        output: Tensor = model(input_ids=token_ids.to(model.device), use_cache=False).logits
        return output

    @torch.inference_mode()
    def hidden(token_ids: Tensor) -> Tensor:
        output: Tensor = body(input_ids=token_ids.to(model.device), use_cache=False).last_hidden_state
        return output

    body, head = model.base_model, model.get_output_embeddings()
    if body is model or head is None:
        return {"logits": logits}
    plain = type(head) is nn.Linear and head.bias is None
    return {
        "logits": logits,
        "hidden": hidden,
        "head": torch.inference_mode()(head),
        "head_weight": head.weight.detach() if plain else None,
    }


def _gptq_backend(quantization: dict[str, Any]) -> Any:
    try:
        import gptqmodel  # noqa: F401
        import optimum  # noqa: F401
        from transformers import GPTQConfig
    except ImportError as error:
        raise InputError(f"loading a GPTQ checkpoint needs optimum and gptqmodel ({one_line(error)})") from error
    return GPTQConfig(bits=quantization["bits"], backend="torch")


def _awq_backend(quantization: dict[str, Any]) -> Any:
    try:
        import gptqmodel  # noqa: F401
        from transformers import AwqConfig
    except ImportError as error:
        raise InputError(f"loading an AWQ checkpoint needs gptqmodel ({one_line(error)})") from error
    return AwqConfig(bits=quantization["bits"], group_size=quantization["group_size"], backend="torch_awq")


def _need_compressed_tensors() -> None:
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise InputError(f"loading a compressed-tensors checkpoint needs compressed-tensors ({one_line(error)})") from error


CONSUMER = Consumer(load=load, for_evaluation=for_evaluation, environment=ENVIRONMENT)
