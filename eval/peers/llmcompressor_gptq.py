"""GPTQ by llm-compressor: ``python -m eval.peers.llmcompressor_gptq MODEL WINDOWS OUT BITS GROUP SYMMETRIC``.

Its own defaults (activation order, dampening, observer) on the linear layers of the decoder, ``lm_head`` left alone. Two things
are in its favour: calibration runs in float32, because float16 matrix products are slow and coarse on most CPUs, and the
artifact is written in float16 nonetheless, as the checkpoint is.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from loguru import logger
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

from eval.peers.record import PeerJob, progress


def quantize(job: PeerJob) -> None:
    """Quantize ``job.model`` on ``job.windows`` and save the compressed artifact."""
    windows = load_file(job.windows)["windows"]
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rows: Any = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    # A loader that is handed in is used as it is: no shuffling, no cutting, no tokenizer.
    loader = DataLoader(rows, batch_size=1, collate_fn=default_data_collator)
    weights = {
        "num_bits": job.bits,
        "type": "int",
        "symmetric": job.symmetric,
        "strategy": "group",
        "group_size": job.group,
    }
    modifier = GPTQModifier(ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})
    count = model.config.num_hidden_layers
    logger.add(
        lambda message: progress(f"{message.record['message']} of {count} layers"),
        filter=lambda record: record["message"].startswith("Quantizing"),
    )
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=loader,
        recipe=modifier,
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
    )
    resolved = modifier.resolved_config.config_groups["group_0"].weights
    job.settings = {
        "actorder": str(getattr(resolved.actorder, "value", resolved.actorder)),
        "damping": modifier.dampening_frac,
        "observer": resolved.observer,
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
