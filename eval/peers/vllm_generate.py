"""Artifacts in vLLM's CPU build: ``python -m eval.peers.vllm_generate PROMPT COUNT OUT DTYPE:ARTIFACT... [--avx2]``.

``PROMPT`` is token ids with commas between, continued greedily by ``COUNT`` tokens on every artifact, computed in ``DTYPE``
(``float32``, ``float16``, ``bfloat16``). ``OUT`` becomes a JSON object: ``versions`` of the packages, ``int4_kernel``, whether
the kernels that vLLM chose for this processor have a 4-bit product, and ``artifacts``, for each directory's name either

``tokens``, ``[COUNT]``, and ``logprobs``, for each of them the natural logarithms of the 20 largest probabilities by token id;
or ``step`` (``load``: before any computing, ``forward``: while computing, ``process``: it died), ``error`` and ``message``.

Each artifact gets a process of its own, forked off this one once vLLM is imported. ``--avx2`` takes the kernels of a processor
without AVX-512.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

# Read when vLLM is imported.
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: its exceptions arrive as they are raised
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

_COMPUTING = {"execute_model", "profile_run", "_dummy_run"}
_TOP = 20


def generate(artifact: Path, dtype: str, prompt: list[int], count: int) -> dict[str, Any]:
    """Load an artifact and continue ``prompt``; what is recorded of it, its failure included."""
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(max_tokens=count, temperature=0, logprobs=_TOP, ignore_eos=True, detokenize=False)
    try:
        model = LLM(
            model=str(artifact),
            dtype=dtype,
            enforce_eager=True,
            max_model_len=len(prompt) + count,
            skip_tokenizer_init=True,
        )
        found = model.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0].outputs[0]
    except Exception as error:
        return {"step": failed_step(error), "error": type(error).__name__, "message": str(error)}
    logprobs = [{token: entry.logprob for token, entry in step.items()} for step in found.logprobs]
    return {"tokens": list(found.token_ids), "logprobs": logprobs}


def failed_step(error: BaseException) -> str:
    """``forward`` where the model was computing when ``error`` was raised, ``load`` before that."""
    names = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    return "forward" if names & _COMPUTING else "load"


def _generate_into(record: Path, artifact: Path, dtype: str, prompt: list[int], count: int) -> None:
    record.write_text(json.dumps(generate(artifact, dtype, prompt, count)), encoding="utf-8")


def isolated(out: Path, artifact: Path, dtype: str, prompt: list[int], count: int) -> dict[str, Any]:
    """:func:`generate` in a process of its own, with a file beside ``out`` for its result."""
    record = out.with_name(f"{out.name}.{artifact.name}")
    child = multiprocessing.get_context("fork").Process(target=_generate_into, args=(record, artifact, dtype, prompt, count))
    child.start()
    child.join()
    if not record.exists():
        return {"step": "process", "error": "died", "message": f"exit code {child.exitcode}"}
    result: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    record.unlink()
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt")
    parser.add_argument("count", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("--avx2", action="store_true")
    options = parser.parse_args()

    import torch

    if options.avx2:
        # vLLM has a library for each of these and asks torch which one the processor runs.
        for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            setattr(torch.cpu, name, lambda: False)
    # The kernels, and what takes long to import, once for all.
    import vllm._custom_ops
    import vllm.entrypoints.llm  # noqa: F401

    prompt = [int(token) for token in options.prompt.split(",")]
    results = {}
    for argument in options.artifacts:
        dtype, _, place = argument.partition(":")
        results[Path(place).name] = isolated(options.out, Path(place), dtype, prompt, options.count)
    found = {
        "versions": {name: metadata.version(name) for name in ("vllm-cpu", "torch")},
        "int4_kernel": hasattr(torch.ops._C, "cpu_gemm_wna16"),
        "artifacts": results,
    }
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
