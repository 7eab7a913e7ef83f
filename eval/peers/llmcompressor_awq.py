"""AWQ by llm-compressor: ``python -m eval.peers.llmcompressor_awq MODEL WINDOWS OUT BITS GROUP SYMMETRIC``.

Its own defaults on the linear layers of the decoder, ``lm_head`` left alone; calibration in float32 and an artifact in float16,
as in :mod:`eval.peers.llmcompressor_gptq`.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

from eval.peers.record import PeerJob


def quantize(job: PeerJob) -> None:
    """Quantize ``job.model`` on ``job.windows`` and save the compressed artifact."""
    windows = load_file(job.windows)["windows"]
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rows: Any = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    loader = DataLoader(rows, batch_size=1, collate_fn=default_data_collator)
    weights = {
        "num_bits": job.bits,
        "type": "int",
        "symmetric": job.symmetric,
        "strategy": "group",
        "group_size": job.group,
    }
    scaling = AWQModifier()
    rounding = QuantizationModifier(ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=loader,
        recipe=[scaling, rounding],
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
    )
    job.settings = {
        "duo_scaling": scaling.duo_scaling,
        "n_grid": scaling.n_grid,
        "calibration dtype": str(model.dtype).removeprefix("torch."),
    }
    model.half()
    model.save_pretrained(job.out, save_compressed=True)
    tokenizer.save_pretrained(job.out)


if __name__ == "__main__":
    job = PeerJob.from_command_line()
    started = time.perf_counter()
    quantize(job)
    job.record(started, ("llmcompressor", "compressed-tensors", "transformers", "torch"))
