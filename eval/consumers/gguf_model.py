"""Transformers as the consumer of GGUF files: it dequantizes them as it loads them, so what is stored is judged in float32.

llama.cpp itself is asked by :mod:`eval.consumers.llamacpp`; it rounds inputs to 8 bits as it multiplies, and this does not.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import torch

from eval.consumers import transformers_model
from eval.consumers.base import Consumer
from eval.consumers.transformers_model import ENVIRONMENT, TransformersArtifact
from quantize.checkpoint import load_tokenizer
from quantize.errors import InputError, one_line


def gguf_file(directory: Path) -> Path:
    """The one GGUF file in ``directory``.

    Raises:
        InputError: there is none, or more than one.
    """
    files = sorted(directory.glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise InputError(f"{directory} must hold exactly one .gguf file, such as model.gguf; found {found}")
    return files[0]


def load(directory: Path, device: str) -> TransformersArtifact:
    """Load the GGUF file in a directory, its weights dequantized to float32, and the tokenizer inside it.

    Raises:
        InputError: there is not exactly one file, or transformers refuses it or finds tensors missing.
    """
    from transformers import AutoModelForCausalLM

    # Absolute: transformers looks for a bare name in the current directory first.
    file = gguf_file(directory).absolute()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=str(file),
            dtype=torch.float32,
            device_map={"": device},
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # gguf-py reports damage by whatever its numpy arithmetic raises
        raise InputError(f"transformers does not load {file} ({one_line(error)}); make it again") from error
    if loading["missing_keys"]:
        # Transformers would fill them with random numbers and only warn.
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise InputError(f"{file} lacks {len(loading['missing_keys'])} tensors, such as {missing}; make it again")
    model = model.eval()
    packages = " + ".join(f"{name} {metadata.version(name)}" for name in ("transformers", "gguf"))
    return TransformersArtifact(
        consumer=packages,
        tokenizer=load_tokenizer(file.parent, file, gguf_file=str(file)),
        compute_dtype="float32",
        max_tokens=getattr(model.config, "max_position_embeddings", None) or 2**31,
        **transformers_model.functions_of(model),
        model=model,
    )


CONSUMER = Consumer(load=load, for_evaluation=transformers_model.for_evaluation, environment=ENVIRONMENT)
