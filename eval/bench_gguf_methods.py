"""The rows of ``python -m eval.bench_gguf``: what each is, and making its file."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from eval.bench_methods import ARTIFACT_STAGES, environment
from eval.bench_process import PROJECT, quantize_command, run_limited
from eval.consumers import llamacpp
from eval.llamacpp_tools import VERSION
from quantize.errors import InputError, one_line
from quantize.files import read_json, sha256_file, sha256_json, write_json

Row = dict[str, Any]
IMATRICES = ("llama.cpp", "ours")
_COLLECTOR = ("calibration/imatrix.py", "exports/imatrix.py")


@dataclass(frozen=True)
class Method:
    """One row: the unquantized file itself, ``llama-quantize``'s work, or a recipe of this project.

    Attributes:
        name: as ``--only`` takes it.
        kind: what ``llama-quantize`` is asked for, such as ``Q4_K_M``.
        pure: the same type for every matrix.
        imatrix: whose importance matrix it gets, one of :data:`IMATRICES`.
        recipe: of this project.
        settings: the recipe's overrides.
        extra: runs only when ``--only`` names it.
    """

    name: str
    kind: str | None = None
    pure: bool = False
    imatrix: str | None = None
    recipe: str | None = None
    settings: tuple[str, ...] = ()
    extra: bool = False


METHODS = (
    Method("f16"),
    Method("q4_0-pure", kind="Q4_0", pure=True),
    Method("q4_0", kind="Q4_0"),
    Method("q4_0-imatrix", kind="Q4_0", imatrix="llama.cpp"),
    Method("q4_0-our-imatrix", kind="Q4_0", imatrix="ours"),
    Method("q4_k_m-imatrix", kind="Q4_K_M", imatrix="llama.cpp"),
    Method("ours-q4_0", recipe="gguf_q4_0"),
    Method("ours-q4_k", recipe="gguf_q4_k"),
    Method("q8_0", kind="Q8_0", extra=True),
    Method("q4_k_m", kind="Q4_K_M", extra=True),
)


@dataclass(frozen=True)
class Setting:
    """What all rows have in common.

    Attributes:
        model: the unquantized checkpoint's directory.
        calibration: text file; None for the built-in text.
        text: file that perplexity is measured on.
        num_samples: calibration windows.
        seq_len: tokens in a calibration window.
        chunks: windows that perplexity is measured on.
        context: tokens in such a window.
        limit: seconds that a program may take.
        work: folder for files, logs and finished rows.
    """

    model: Path
    calibration: Path | None
    text: Path
    num_samples: int
    seq_len: int
    chunks: int
    context: int
    limit: float
    work: Path

    @property
    def base(self) -> Path:
        """The unquantized model as a GGUF file."""
        return self.work / "base-f16.gguf"

    @property
    def base_logits(self) -> Path:
        """What the unquantized model predicts."""
        return self.work / "base.logits"

    @property
    def calibration_text(self) -> Path:
        """The part of the calibration text that recipes calibrate on, as a file for ``llama-imatrix``."""
        return self.work / "calibration.txt"

    @property
    def base_figures(self) -> Path:
        """The unquantized model's perplexity."""
        return self.work / "base-figures.json"

    def imatrix_record(self, maker: str) -> Path:
        """Under which settings an importance matrix was made, and what it cost."""
        return self.work / f"imatrix-{maker}.json"

    def overrides(self) -> list[str]:
        """A recipe's settings for the model and the calibration windows."""
        source = ["calibration=builtin"]
        if self.calibration is not None:
            source = ["calibration=text", f"calibration.path='{self.calibration}'"]
        counts = [f"calibration.num_samples={self.num_samples}", f"calibration.seq_len={self.seq_len}"]
        return [f"model.path='{self.model}'", *source, *counts, "device=cpu"]


def missing(method: Method) -> str | None:
    """What a method lacks, in words; None when it can run."""
    if method.recipe and not (PROJECT / "recipes" / "recipe" / f"{method.recipe}.yaml").exists():
        return f"no recipe {method.recipe}"
    return None


def make_base(setting: Setting) -> None:
    """Convert the checkpoint to GGUF in F16.

    Raises:
        InputError: the conversion fails.
    """
    arguments = ["exports.gguf_convert", str(setting.model), str(setting.base), "--type", "F16"]
    _python(arguments, "base", setting)


def make(method: Method, setting: Setting) -> tuple[Path, float]:
    """Make a method's file; returns it and the seconds it took, its importance matrix included.

    Raises:
        InputError: a program fails or is stopped.
    """
    if method.recipe:
        return _run_recipe(method, setting)
    if method.kind is None:
        return setting.base, 0.0
    imatrix, seconds = importance_matrix(method.imatrix, setting) if method.imatrix else (None, 0.0)
    target = run_directory(method, setting) / "model.gguf"
    seconds += llamacpp.quantize(setting.base, target, method.kind, imatrix=imatrix, pure=method.pure, limit=setting.limit)
    return target, seconds


def importance_matrix(maker: str, setting: Setting) -> tuple[Path, float]:
    """An importance matrix of the calibration text, kept for all rows and later runs, and the seconds that it took.

    Raises:
        InputError: a program fails or is stopped.
    """
    target, record = setting.work / f"imatrix-{maker}.gguf", setting.imatrix_record(maker)
    inputs = [setting.base, setting.calibration_text, *(PROJECT / name for name in _COLLECTOR)]
    key = sha256_json([VERSION, setting.num_samples, setting.seq_len, *map(sha256_file, inputs)])
    if record.exists() and target.exists() and (kept := read_json(record))["key"] == key:
        return target, float(kept["seconds"])
    record.unlink(missing_ok=True)
    if maker == "llama.cpp":
        seconds = llamacpp.importance_matrix(
            setting.base,
            setting.calibration_text,
            target,
            context=setting.seq_len,
            chunks=setting.num_samples,
            limit=setting.limit,
        )
    else:
        text = "builtin" if setting.calibration is None else str(setting.calibration)
        options = ["--chunks", str(setting.num_samples), "--seq-len", str(setting.seq_len), "--device", "cpu"]
        seconds = _python(
            ["calibration.imatrix", str(setting.model), str(target), "--text", text, *options], record.stem, setting
        )
    write_json(record, {"key": key, "seconds": seconds})
    return target, seconds


def _run_recipe(method: Method, setting: Setting) -> tuple[Path, float]:
    directory = run_directory(method, setting)
    command = quantize_command(str(method.recipe), directory, [*setting.overrides(), *method.settings, ARTIFACT_STAGES])
    _python(command[2:], method.name, setting)
    files = sorted((directory / "variants").glob("*/*.gguf"))
    if len(files) != 1:
        raise InputError(f"recipe {method.recipe} wrote {len(files)} .gguf files below {directory / 'variants'}, not one")
    steps = read_json(directory / "manifest.json")["steps"]
    return files[0], sum(step["seconds"] for step in steps.values())


def _python(arguments: Sequence[str], name: str, setting: Setting) -> float:
    """``python -m`` in a process of its own; returns its seconds."""
    log, started = setting.work / "logs" / f"{name}.log", time.perf_counter()
    command = [sys.executable, "-m", *arguments]
    outcome = run_limited(command, log=log, limit=setting.limit, environment=environment(sys.executable))
    if outcome.returncode is None:
        raise InputError(f"{arguments[0]} was stopped after {setting.limit:g} s; its last line: {outcome.last}")
    if outcome.returncode:
        raise InputError(f"{arguments[0]} failed (exit code {outcome.returncode}); its last line: {outcome.last}")
    return time.perf_counter() - started


def sizes_of(file: Path) -> Row:
    """Bytes of a GGUF file, and bits for each weight: of the tensors alone, metadata and vocabulary left out.

    Raises:
        InputError: it cannot be read.
    """
    try:
        tensors = gguf.GGUFReader(file).tensors
        stored, weights = sum(int(t.n_bytes) for t in tensors), sum(int(t.n_elements) for t in tensors)
    except Exception as error:  # gguf-py reports damage by whatever its numpy arithmetic raises
        raise InputError(f"{file} is no readable GGUF file ({one_line(error)}); make it again") from error
    return {"size_bytes": file.stat().st_size, "bits_per_weight": 8 * stored / weights}


def figures(method: Method, setting: Setting, file: Path) -> Row:
    """What llama.cpp says of a method's file: perplexity, divergence from the unquantized model, speed.

    Raises:
        InputError: a program fails or is stopped.
    """
    row = sizes_of(file)
    if file == setting.base:
        row |= read_json(setting.base_figures)  # measured when its predictions were written
    else:
        found = llamacpp.kl_divergence(file, setting.base_logits, limit=setting.limit)
        row |= {"ppl": found.ppl, "ppl_error": found.ppl_error, "tokens": found.tokens}
        row |= {"kld": found.mean, "kld_p99": found.p99, "same_top": found.same_top}
    speed = llamacpp.bench(file, limit=setting.limit)
    return row | {"prompt_speed": speed.prompt, "generation_speed": speed.generation, "threads": speed.threads}


def run_directory(method: Method, setting: Setting) -> Path:
    """Where a method's file is made."""
    return setting.work / "runs" / method.name
