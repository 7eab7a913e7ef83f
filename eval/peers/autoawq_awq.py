"""AWQ by AutoAWQ: ``python -m eval.peers.autoawq_awq MODEL WINDOWS OUT BITS GROUP SYMMETRIC``.

Its own defaults (20 strengths, duo scaling, clipping) on all calibration windows. As with llm-compressor, two things are in its
favour: calibration runs in float32, because float16 matrix products are slow and coarse on most CPUs, and the artifact is
written in float16 nonetheless, as the checkpoint is.

It needs one patch on a CPU. ``Tensor.cpu`` is how it copies what it is about to change in place: the weights that every
candidate scales, and the inputs of layers that share one. On a CPU ``cpu()`` gives the tensor itself, candidates then scale
each other's weights, and the result is noise. Here it copies, as it does on a GPU. And the transformers it was last tested
with does not know where newer ones keep the base of the rotary embedding: it is told.
"""

from __future__ import annotations

import json
import shutil
import time

import torch
from awq import AutoAWQForCausalLM
from safetensors.torch import load_file

from eval.peers.record import PeerJob


def quantize(job: PeerJob) -> None:
    """Quantize ``job.model`` on ``job.windows`` and save the artifact."""
    torch.Tensor.cpu = torch.Tensor.clone  # type: ignore[assignment,method-assign]
    windows = load_file(job.windows)["windows"]
    rotary = json.loads((job.model / "config.json").read_text()).get("rope_parameters") or {}
    known = {key: value for key, value in rotary.items() if key == "rope_theta"}
    model = AutoAWQForCausalLM.from_pretrained(str(job.model), torch_dtype=torch.float32, **known)
    grid = {"zero_point": not job.symmetric, "q_group_size": job.group, "w_bit": job.bits, "version": "GEMM"}
    model.quantize(
        quant_config=grid,
        calib_data=windows.tolist(),
        max_calib_samples=len(windows),
        max_calib_seq_len=windows.shape[1],
    )
    job.settings = {"duo_scaling": True, "apply_clip": True, "calibration dtype": "float32"}
    model.model.half()
    model.save_quantized(str(job.out))
    # Its calibration takes token ids; the tokenizer's files may be of a newer transformers than it runs beside.
    for file in job.model.glob("tokenizer*"):
        shutil.copy(file, job.out)


if __name__ == "__main__":
    job = PeerJob.from_command_line()
    started = time.perf_counter()
    quantize(job)
    job.record(started, ("autoawq", "transformers", "torch"))
