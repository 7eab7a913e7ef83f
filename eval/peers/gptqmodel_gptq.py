"""GPTQ by GPTQModel: ``python -m eval.peers.gptqmodel_gptq MODEL WINDOWS OUT BITS GROUP SYMMETRIC [DTYPE]``.

Its own defaults, which on a CPU include calibration in bfloat16 and an artifact whose unquantized tensors are bfloat16;
``DTYPE`` (``float16``, ``float32``) has it load the checkpoint in that type instead.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

# Both are read when GPTQModel is imported. Without a bound it starts more CPU workers than small machines survive, and
# torch.compile spends minutes on kernels that run for seconds.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.utils.cpp import load_pack_block_extension
from safetensors.torch import load_file

from eval.peers.record import PeerJob, progress


def quantize(job: PeerJob, dtype: str | None) -> None:
    """Quantize ``job.model`` on ``job.windows`` and save the artifact."""
    windows = load_file(job.windows)["windows"]
    config = QuantizeConfig(bits=job.bits, group_size=job.group, sym=job.symmetric)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)} if dtype else {}
    model = GPTQModel.load(str(job.model), config, **options)
    count = model.model.config.num_hidden_layers

    def layer_complete(layer_idx: int, submodule_finalized: bool) -> None:
        progress(f"layer {layer_idx + 1} of {count} {'written' if submodule_finalized else 'quantized'}")

    model.layer_callback = layer_complete
    job.settings = {
        "desc_act": config.desc_act,
        "act_group_aware": config.act_group_aware,
        "damping": config.damp_percent,
        "true_sequential": config.true_sequential,
        "calibration dtype": str(model.model.dtype).removeprefix("torch."),
    }
    progress(f"layer 0 of {count}")
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows.tolist()], batch_size=1)
    model.save(str(job.out))


if __name__ == "__main__":
    wanted = sys.argv[7] if len(sys.argv) > 7 else None
    job = PeerJob.from_command_line(sys.argv[1:7])
    # Its packing kernel is compiled on first use and kept for good: part of the installation, not of the quantization.
    load_pack_block_extension()
    started = time.perf_counter()
    quantize(job, wanted)
    job.record(started, ("gptqmodel", "transformers", "torch"))
