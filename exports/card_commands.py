"""How an artifact is run, by its container: the commands a model card gives for transformers, vLLM, llama.cpp and Ollama."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

# What must be installed besides transformers and torch, by container.
_PACKAGES = {
    "gptq": "optimum gptqmodel",
    "awq": "optimum gptqmodel",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "gguf": "gguf",
}
_VLLM = ("safetensors", "gptq", "awq", "compressed-tensors", "bitsandbytes")


def how_to_run(name: str, container: str, files: Sequence[str], base_model: str | None = None) -> list[str]:
    """Markdown blocks, one heading a program; all commands are for the release's own directory.

    Args:
        name: the release's name, for Ollama's model.
        container: as in the artifact's manifest.
        files: names of the release's files: which GGUF file there is.
        base_model: hub id with the tokenizer, for vLLM with GGUF.
    """
    gguf = next((file for file in sorted(files) if file.endswith(".gguf")), None)
    return [
        "### transformers",
        *_transformers(container, gguf),
        "### vLLM",
        *_vllm(container, gguf, base_model),
        "### llama.cpp",
        *_llama_cpp(gguf),
        "### Ollama",
        *_ollama(name, container, gguf),
    ]


def _transformers(container: str, gguf: str | None) -> list[str]:
    packages = " ".join(filter(None, ["transformers accelerate", _PACKAGES.get(container)]))
    chosen = f", gguf_file={json.dumps(gguf)}" if gguf else ""
    note = ["transformers decodes the file to 32-bit weights; llama.cpp runs it as it is."] if gguf else []
    code = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{chosen})
model = AutoModelForCausalLM.from_pretrained(".", device_map="auto"{chosen})
inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
    return [_sh(f"pip install {packages}"), f"```python\n{code}\n```", *note]


def _vllm(container: str, gguf: str | None, base_model: str | None) -> list[str]:
    if gguf:
        tokenizer = f" --tokenizer {base_model}" if base_model else ""
        return [_sh(f"vllm serve ./{gguf}{tokenizer}"), "vLLM's support of GGUF is experimental."]
    if container not in _VLLM:
        return [f"vLLM does not load {container}."]
    return [_sh("vllm serve .")]


def _llama_cpp(gguf: str | None) -> list[str]:
    if not gguf:
        return ["llama.cpp loads GGUF files only: make one with `container=gguf`."]
    lines = [f'llama-completion -m {gguf} -p "The capital of France is" -n 20 -no-cnv', f"llama-server -m {gguf}"]
    return [_sh("\n".join(lines))]


def _ollama(name: str, container: str, gguf: str | None) -> list[str]:
    if not gguf and container != "safetensors":
        return ["Ollama loads GGUF files and unquantized safetensors only: make a GGUF file with `container=gguf`."]
    model = re.sub(r"[^a-z0-9._-]+", "-", name.lower())
    return [
        _sh(f"echo 'FROM {'./' + gguf if gguf else '.'}' > Modelfile\nollama create {model} -f Modelfile\nollama run {model}")
    ]


def _sh(commands: str) -> str:
    return f"```sh\n{commands}\n```"
