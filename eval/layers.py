"""Which layers of an artifact cost what: errors of weights and outputs, and each layer's share of the divergence.

    python -m eval.layers ARTIFACT --baseline ARTIFACT_OR_CHECKPOINT --windows 4 --seq-len 512 --png layers.png

Each layer that the artifact stores otherwise than the baseline is swapped into the baseline alone, and the Kullback-Leibler
divergence of the predictions from the baseline's is measured over the whole vocabulary (nats a token). A layer's share is its
part of the sum over layers. Errors meet and add up or cancel: ``interaction`` is the whole artifact's divergence less the sum.
Everything is computed in float32 from the weights as this project's readers dequantize them; a consumer's kernels may round
more. Scales that were folded into norms and other layers are taken back first (:mod:`eval.unfolding`).
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration.sources import load_text
from calibration.windows import token_stream
from eval.layer_report import render_heat_map, render_markdown, render_table
from eval.stored_model import bits_of, input_rounding, kind_of, open_model
from eval.unfolding import unfold
from quantize.blocks import DecoderWalk
from quantize.checkpoint import Checkpoint
from quantize.config import LOG_LEVELS
from quantize.devices import resolve_device
from quantize.errors import InputError
from quantize.files import atomic_path, write_json, write_text
from quantize.logs import progress, quiet_libraries, setup_logging
from quantize.swapping import Swap, SwapBench, Trial, swapped

SCHEMA = 1
_HELD_BYTES = 2**28  # hidden states of trials that pass through the blocks together
_KEEP_SHARE = 0.5  # of the sum of divergences, carried by the layers that are named
_SAME = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True)
class LayerResult:
    """One layer. Errors are relative (norm of the error over norm of what is right).

    ``stored``: on which grid. ``bits``: of its codes, None for floating numbers. ``weights``: their number. ``output_error``
    and ``snr_db`` (signal to noise of its output, on the baseline's own inputs) are None where no token reaches the layer and
    for the embedding; ``snr_db`` also where there is no error. ``kl``: nats a token. ``share``: of the sum over layers.
    """

    name: str
    stored: str
    bits: int | None
    weights: int
    weight_error: float
    output_error: float | None
    snr_db: float | None
    kl: float
    share: float


class Diagnosis:
    """An artifact beside its baseline on some windows."""

    def __init__(self, artifact: Checkpoint, baseline: Checkpoint, windows: Tensor, device: torch.device) -> None:
        """Run the baseline once on ``windows``, int64 ``[windows, tokens]``.

        Raises:
            InputError: the two are not the same model.
        """
        _check_same(artifact, baseline)
        self.artifact, self.windows = artifact, windows
        self.base = DecoderWalk(baseline, device, torch.float32)
        self.stored = DecoderWalk(artifact, device, torch.float32)
        self.bench = SwapBench(self.base, windows)

    def swaps(self, index: int) -> dict[str, Swap]:
        """What takes the place of a block's layers, of those that the artifact has changed."""
        names = self.base.layer_names(index)
        originals = {name: self.base.weight(name) for name in names}
        weights = {name: self.stored.weight(name) for name in names}
        changed = [name for name in names if not torch.equal(originals[name], weights[name])]
        if not changed:
            return {}
        with self.base.loaded_block(index) as block:
            prefix, hidden = f"{self.base.path}.{index}.", self.bench.states[index][:1]
            arguments = self.bench.arguments[index]
            weights = unfold(block, prefix, hidden, arguments, self.stored, weights, originals)
        return {name: Swap(weights[name], input_rounding(self.artifact, name)) for name in changed}

    def block(self, index: int) -> list[LayerResult]:
        """The layers of a block that the artifact has changed; ``share`` is left 0."""
        trial = self.swaps(index)
        errors, kl = self.bench.output_errors(index, trial), self._divergences(trial)
        return [
            self._result(name, swap.weight, self.base.weight(name), errors[name].signal, errors[name].noise, kl[name])
            for name, swap in trial.items()
        ]

    def _divergences(self, trial: Trial) -> dict[str, float]:
        """The divergence of each layer alone, as many at a time as memory is meant for."""
        at_once = max(1, _HELD_BYTES // (self.bench.states[0].numel() * 4))
        names, found = list(trial), {}
        for start in range(0, len(names), at_once):
            found.update(self.bench.divergences({name: {name: trial[name]} for name in names[start : start + at_once]}))
        return found

    def _result(self, name: str, weight: Tensor, original: Tensor, signal: float, noise: float, kl: float) -> LayerResult:
        tied = f"{name}.weight" not in self.artifact.names()
        stored = self.base.embedding() if tied and name in self.base.head() else name
        relative = math.sqrt(noise / signal) if signal else None
        return LayerResult(
            name=name,
            stored=kind_of(self.artifact, stored),
            bits=bits_of(self.artifact, stored),
            weights=weight.numel(),
            weight_error=float((weight - original).norm() / original.norm().clamp(min=torch.finfo(torch.float32).tiny)),
            output_error=relative,
            snr_db=-20 * math.log10(relative) if relative else None,
            kl=kl,
            share=0.0,
        )

    @torch.no_grad()
    def ends(self) -> list[LayerResult]:
        """The input and the output embedding, where the artifact has changed them."""
        results, (head,) = [], self.base.head()
        embedding = self.base.embedding()
        weight, original = (walk.parameter(f"{embedding}.weight") for walk in (self.stored, self.base))
        if not torch.equal(weight, original):
            hidden = self.stored.block_inputs(self.windows)
            for index in range(self.base.count):
                with self.base.loaded_block(index) as block:
                    hidden = self.bench.through(index, block, hidden)
            results.append(self._result(embedding, weight, original, 0.0, 0.0, self.bench.compare({"": hidden})[""]))
        weight, original = self.stored.weight(head), self.base.weight(head)
        if not torch.equal(weight, original):
            signal = noise = 0.0
            for window in torch.split(self.bench.states[-1], 1):
                inputs = self.base.head_inputs(window)[0].float()
                signal += float((inputs @ original.t()).double().square().sum())
                noise += float((inputs @ (weight - original).t()).double().square().sum())
            kl = self.bench.compare({"": self.bench.states[-1]}, self.stored)[""]
            results.append(self._result(head, weight, original, signal, noise, kl))
        return results

    @torch.no_grad()
    def whole(self) -> float:
        """The artifact's own divergence: all of its tensors at once."""
        hidden = self.stored.block_inputs(self.windows)
        for index in range(self.stored.count):
            rounded = {
                name: Swap(self.stored.weight(name), change)
                for name in self.stored.layer_names(index)
                if (change := input_rounding(self.artifact, name)) is not None
            }
            prefix = f"{self.stored.path}.{index}."
            inside = {name.removeprefix(prefix): swap for name, swap in rounded.items()}
            with self.stored.loaded_block(index) as block, swapped(block, inside):
                hidden = self.bench.through(index, block, hidden)
        return self.bench.compare({"": hidden}, self.stored)[""]


def diagnose(
    artifact: str,
    baseline: str,
    *,
    text: str = "builtin",
    part: str | None = None,
    windows: int = 4,
    seq_len: int = 512,
    device: str = "cpu",
) -> dict[str, Any]:
    """All layers of an artifact: JSON values.

    Returns:
        ``layers`` (the fields of :class:`LayerResult`, in the model's order), ``kl`` (``sum``, ``whole``, ``interaction``),
        ``keep`` (:func:`layers_to_keep`), ``protocol``, ``artifact`` and ``baseline``.

    Raises:
        InputError: one of the two cannot be read, they are different models, or the text is too short.
    """
    for key, value, least in (("windows", windows, 1), ("seq-len", seq_len, 2)):
        if value < least:
            raise InputError(f"--{key}={value} is below {least}; use --{key}={4 if least == 1 else 512}")
    original, stored = open_model(baseline), open_model(artifact)
    part = part or ("heldout" if text == "builtin" else "all")
    if text != "builtin" and not Path(text).is_file():
        raise InputError(f"--text={text} does not exist; give a text file or builtin")
    source, path = ("builtin", None) if text == "builtin" else ("text", text)
    content = load_text(source, part, path=path, key="eval").text
    tokens = _cut(token_stream(original.tokenizer(), content), windows, seq_len, original)
    diagnosis = Diagnosis(stored, original, tokens, resolve_device(device))
    found = [layer for index in progress(range(diagnosis.base.count), "layers") for layer in diagnosis.block(index)]
    found += diagnosis.ends()
    total, whole = math.fsum(layer.kl for layer in found), diagnosis.whole()
    layers = [{**asdict(layer), "share": layer.kl / total if total else 0.0} for layer in found]
    return {
        "schema": SCHEMA,
        "artifact": Path(artifact).name,
        "baseline": Path(baseline).name,
        "protocol": {
            "text": text if text == "builtin" else Path(text).name,
            "part": part,
            "windows": windows,
            "seq_len": seq_len,
            "tokens": windows * seq_len,
            "compute_dtype": "float32",
        },
        "kl": {"sum": total, "whole": whole, "interaction": whole - total},
        "layers": layers,
        "keep": layers_to_keep(layers),
    }


def layers_to_keep(layers: Sequence[dict[str, Any]], share: float = _KEEP_SHARE) -> dict[str, Any]:
    """The layers that are worth 8 bits: in order of divergence a byte that 8 bits would add, until they carry ``share`` of it.

    Layers already in 8 bits or more do not count, nor does the input embedding, which no solver here quantizes.

    Returns:
        ``layers`` (names), ``share`` of the sum over all layers, ``weights`` (part of all quantized weights), ``extra_bytes``.
    """
    able = [layer for layer in layers if layer["bits"] is not None and layer["bits"] < 8 and layer["output_error"] is not None]
    wanted, chosen, carried = share * math.fsum(layer["kl"] for layer in able), [], 0.0
    for layer in sorted(able, key=lambda layer: -layer["kl"] / (layer["weights"] * (8 - layer["bits"]))):
        if carried >= wanted or not layer["kl"]:
            break
        chosen.append(layer)
        carried += layer["kl"]
    total, weights = math.fsum(layer["kl"] for layer in layers), sum(layer["weights"] for layer in layers)
    return {
        "layers": [layer["name"] for layer in chosen],
        "share": carried / total if total else 0.0,
        "weights": sum(layer["weights"] for layer in chosen) / weights if weights else 0.0,
        "extra_bytes": sum(layer["weights"] * (8 - layer["bits"]) // 8 for layer in chosen),
    }


def _cut(ids: Tensor, windows: int, seq_len: int, model: Checkpoint) -> Tensor:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and seq_len > context:
        raise InputError(f"--seq-len={seq_len} exceeds the model's context of {context} tokens; use --seq-len={context}")
    room = len(ids) // seq_len
    if room < windows:
        raise InputError(
            f"the text has {len(ids)} tokens, room for {room} windows of --seq-len={seq_len}; use --windows={max(room, 1)}, "
            "a smaller --seq-len or a longer text"
        )
    return ids[: windows * seq_len].view(windows, seq_len)


def _check_same(artifact: Checkpoint, baseline: Checkpoint) -> None:
    one, other = artifact.config.get_text_config(), baseline.config.get_text_config()
    for key in _SAME:
        if getattr(one, key, None) != getattr(other, key, None):
            raise InputError(
                f"{artifact.path} has {key}={getattr(one, key, None)}, but the baseline {baseline.path} has "
                f"{getattr(other, key, None)}; give the checkpoint that the artifact was made from"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.layers", description="Which layers of an artifact cost what.")
    parser.add_argument("artifact", help="artifact directory, in any container, or FILE.gguf")
    parser.add_argument(
        "--baseline", required=True, help="the checkpoint it was made from, or another artifact of the same model"
    )
    parser.add_argument("--text", default="builtin", help="text file, or builtin (Python's own documentation topics)")
    parser.add_argument("--part", choices=("all", "train", "heldout"), help="default: heldout of builtin, all of a file")
    parser.add_argument("--windows", type=int, default=4, help="number of windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a window")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, mps")
    parser.add_argument("--top", type=int, default=20, help="layers in the printed table, the costliest first; 0: all")
    parser.add_argument("--json", type=Path, help="write all layers to this file")
    parser.add_argument("--markdown", type=Path, help="write the table of all layers to this file")
    parser.add_argument("--png", type=Path, help="draw blocks and kinds of layers as a heat map")
    parser.add_argument("--log-level", default="info", choices=LOG_LEVELS)
    return parser


def _lines(result: dict[str, Any]) -> Iterator[str]:
    """What is printed below the table; the layers to keep come last."""
    kl, keep = result["kl"], result["keep"]
    yield f"sum of layers {kl['sum']:.3g}, whole artifact {kl['whole']:.3g}, interaction {kl['interaction']:+.3g} nats a token"
    if not keep["layers"]:
        yield "keep in 8 bits: none; no layer below 8 bits moves the predictions"
        return
    yield (
        f"keep in 8 bits: {', '.join(keep['layers'])} ({keep['share']:.0%} of the sum, {keep['weights']:.1%} of the weights, "
        f"{keep['extra_bytes'] / 1e6:.3g} MB more)"
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 0 done, 2 bad input."""
    options = vars(_parser().parse_args(arguments))
    outputs = {key: options.pop(key) for key in ("json", "markdown", "png")}
    top = options.pop("top")
    setup_logging(options.pop("log_level"))
    quiet_libraries()
    try:
        if top < 0:
            raise InputError(f"--top={top} is negative; use --top=20, or --top=0 for all layers")
        result = diagnose(**options)
        if outputs["json"]:
            write_json(outputs["json"], result)
        if outputs["markdown"]:
            write_text(outputs["markdown"], render_markdown(result))
        if outputs["png"]:
            with atomic_path(outputs["png"]) as path:
                path.write_bytes(render_heat_map(result))
    except InputError as error:
        logging.getLogger("eval").error("%s", error)
        return 2
    render_table(result, top)
    print("\n".join(_lines(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
