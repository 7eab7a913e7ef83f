"""Importance matrices by this project's own model walk: ``python -m calibration.imatrix MODEL OUT.gguf --text FILE``.

For every linear layer the squares of its inputs are summed column by column over calibration windows, in the unquantized model,
which is what ``llama-imatrix`` collects. One decoder block is in memory at a time, beside the hidden states of all windows. The
file serves ``llama-quantize --imatrix`` (:mod:`exports.imatrix`). On the same tokens the values are those of ``llama-imatrix``,
up to its rounding of inputs to the weights' 16 bits.

Two things differ unless asked for. ``llama-imatrix`` takes the first windows of a text, this project a seeded choice among all
of them (``--in-order``); and it puts BOS in the place of each window's first token where the model's tokenizer adds one
(``--bos``).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration.sources import PARTS, load_text
from calibration.windows import pack_windows
from exports.gguf_names import TensorMap
from exports.imatrix import ImatrixEntry, write
from quantize.blocks import DecoderWalk, linear_layers
from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.devices import resolve_compute_dtype, resolve_device
from quantize.errors import InputError
from quantize.forwards import run_block
from quantize.logs import progress, quiet_libraries, setup_logging
from quantize.manifest import release_memory

_BATCH_TOKENS = 4096  # that pass through a block at once


class _Sums:
    """Sums of squares of the inputs of some layers: float64 ``[in_features]`` by layer, and how many inputs they are of."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, layer: str, inputs: Tensor) -> None:
        """Add inputs ``[..., in_features]``."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        total = rows.square().sum(0).double().cpu()
        self.sums[layer] = self.sums[layer] + total if layer in self.sums else total
        self.counts[layer] = self.counts.get(layer, 0) + len(rows)

    def watch(self, layer: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A hook that adds the inputs of ``layer``."""
        return lambda _, args: self.add(layer, args[0])

    def entries(self, name: Callable[[str], str]) -> dict[str, ImatrixEntry]:
        """As an importance matrix; ``name`` gives a layer's matrix in the GGUF model."""
        return {
            name(layer): ImatrixEntry(total.float().numpy(), np.array([self.counts[layer]], np.int64))
            for layer, total in self.sums.items()
        }


@torch.no_grad()
def collect(
    checkpoint: Checkpoint, windows: Tensor, *, device: torch.device, dtype: torch.dtype, output: bool = False
) -> dict[str, ImatrixEntry]:
    """Sum the squares of the inputs of every linear layer.

    Args:
        checkpoint: the unquantized model.
        windows: token ids int64 ``[windows, tokens]``.
        device: to compute on.
        dtype: to compute in; sums are float64.
        output: the output embedding as well. Where it is the input embedding's matrix, the entry is that matrix's, for which
            ``llama-imatrix`` collects nothing.

    Returns:
        Entries by the matrix's name in the GGUF model, one for each linear layer that an input reached.

    Raises:
        InputError: the model's family has no GGUF form, or its blocks cannot be found.
    """
    walk, sums = DecoderWalk(checkpoint, device, dtype), _Sums()
    name = _names(checkpoint)
    for index in range(walk.count):
        for layer in walk.layer_names(index):
            name(layer)  # refuses what has no name there before anything is computed
    batches = torch.split(windows, max(1, _BATCH_TOKENS // windows.shape[1]))
    hidden = [walk.block_inputs(batch).cpu() for batch in batches]
    arguments = walk.block_arguments(windows.shape[1])
    for index in progress(range(walk.count), "imatrix"):
        with walk.loaded_block(index) as block:
            prefix = f"{walk.path}.{index}."
            layers = linear_layers(block).items()
            handles = [module.register_forward_pre_hook(sums.watch(prefix + layer)) for layer, module in layers]
            try:
                for number, states in enumerate(hidden):
                    hidden[number] = run_block(block, states.to(device), arguments[index]).cpu()
            finally:
                for handle in handles:
                    handle.remove()
        release_memory()
    if output:
        (head,) = walk.head()
        for states in hidden:
            sums.add(head, walk.head_inputs(states))
    embedding = "token_embd.weight"
    return sums.entries(lambda layer: embedding if output and walk.tied and layer == head else name(layer))


def _names(checkpoint: Checkpoint) -> Callable[[str], str]:
    """Gives the name that a linear layer's weight has in GGUF."""
    tensors = TensorMap(checkpoint.config_dict())

    def name(layer: str) -> str:
        found = tensors.name(f"{layer}.weight")
        if found is None:
            raise InputError(f"{checkpoint.path}: layer {layer} has no matrix of its own in a GGUF model")
        return found

    return name


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m calibration.imatrix", description="Collect an importance matrix for llama-quantize."
    )
    parser.add_argument("model", help="unquantized checkpoint: directory, .gguf file or hub id")
    parser.add_argument("target", type=Path, help="the file to write, by custom .gguf")
    parser.add_argument("--text", default="builtin", help="text file, or builtin (Python's own documentation topics)")
    parser.add_argument("--part", choices=PARTS, default="train", help="of the text; default: train, as recipes calibrate")
    parser.add_argument("--chunks", type=int, default=64, help="calibration windows; -1 for all")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a window")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of windows")
    parser.add_argument("--in-order", action="store_true", help="the first windows of the text in the place of a seeded choice")
    parser.add_argument("--bos", action="store_true", help="BOS in the place of each window's first token")
    parser.add_argument("--output", action="store_true", help="the output embedding as well")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps; default: the first there is of cuda, mps, cpu")
    return parser.parse_args(arguments)


def choose_windows(checkpoint: Checkpoint, options: argparse.Namespace) -> Tensor:
    """The token windows, int64 ``[windows, tokens]``.

    Raises:
        InputError: the text is missing or too short, or the tokenizer has no BOS.
    """
    source, path = ("builtin", None) if options.text == "builtin" else ("text", options.text)
    part = load_text(source, options.part, path=path, key="text")
    tokenizer = checkpoint.tokenizer()
    windows = pack_windows(
        tokenizer,
        part,
        num_samples=-1 if options.in_order else options.chunks,
        seq_len=options.seq_len,
        seed=options.seed,
        vocab_size=checkpoint.config.get_text_config().vocab_size,
        key="text",
    )
    if options.in_order and options.chunks != -1:
        if not 1 <= options.chunks <= len(windows):
            raise InputError(
                f"--chunks {options.chunks} is not to be had: the text has {len(windows)} windows; use --chunks -1"
            )
        windows = windows[: options.chunks]
    if options.bos:
        if tokenizer.bos_token_id is None:
            raise InputError(f"--bos: the tokenizer of {checkpoint.path} has no BOS token; leave --bos out")
        windows = windows.clone()
        windows[:, 0] = tokenizer.bos_token_id
    return windows


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 0 done, 2 bad input."""
    options = parse(arguments)
    setup_logging("info")
    quiet_libraries()
    logging.getLogger("gguf").setLevel(logging.WARNING)
    log = logging.getLogger("imatrix")
    try:
        checkpoint, device = open_checkpoint(options.model), resolve_device(options.device)
        stored = checkpoint.dtype(checkpoint.names()[0])
        windows = choose_windows(checkpoint, options)
        dtype = resolve_compute_dtype("auto", device, stored)
        entries = collect(checkpoint, windows, device=device, dtype=dtype, output=options.output)
        write(options.target, entries, [Path(options.text).name], *windows.shape)
    except InputError as error:
        log.error("%s", error)
        return 2
    log.info("%s: %d matrices, %d windows of %d tokens", options.target, len(entries), *windows.shape)
    return 0


if __name__ == "__main__":
    sys.exit(main())
