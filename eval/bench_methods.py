"""The rows of ``python -m eval.bench_gptq`` and ``eval.bench_awq``: what each is, running it within a limit, what it cost."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from eval.bench_process import PROJECT, Outcome, quantize_command, run_limited
from eval.consumers.transformers_model import ENVIRONMENT
from quantize import __version__
from quantize.errors import InputError
from quantize.files import read_json, sha256_file

ARTIFACT_STAGES = "stages=[load,calibrate,quantize,export]"
Row = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        name: as ``--only`` takes it.
        package: whose quantizer it is: ``quantize`` (this project), ``llmcompressor``, ``gptqmodel`` or ``autoawq``.
        bits: of a weight.
        group: weights that share a scale; None without quantization.
        symmetric: None without quantization.
        recipe: of this project.
        settings: this project's overrides, or further arguments of the peer's script.
        extra: runs only when ``--only`` names it.
        algorithm: which of the peer's scripts is run: ``gptq`` or ``awq``.
    """

    name: str
    package: str = "quantize"
    bits: int = 4
    group: int | None = 64
    symmetric: bool | None = False
    recipe: str = "gptq"
    settings: tuple[str, ...] = ()
    extra: bool = False
    algorithm: str = "gptq"


METHODS = (
    Method("fp16", bits=16, group=None, symmetric=None, recipe="fp16"),
    Method("rtn", settings=("solver=rtn",)),
    Method("ours-fast", settings=("quality=fast",)),
    Method("ours-balanced", settings=("quality=balanced",)),
    Method("ours-best", settings=("quality=best",)),
    Method("ours-best-symmetric", symmetric=True, settings=("quality=best",)),
    Method("ours-best-3bit", bits=3, settings=("quality=best",)),
    Method("llmcompressor", package="llmcompressor", symmetric=True),
    Method("gptqmodel", package="gptqmodel", symmetric=True),
    # GPTQModel's own default on a CPU is bfloat16, which costs an FP16 checkpoint precision; this is how much.
    Method("gptqmodel-float32", package="gptqmodel", symmetric=True, settings=("float32",), extra=True),
)


@dataclass(frozen=True)
class Bench:
    """A comparison.

    Attributes:
        name: of its module and its files: ``gptq``, ``awq``.
        methods: its rows.
    """

    name: str
    methods: tuple[Method, ...]

    @property
    def module(self) -> str:
        """As ``python -m`` takes it."""
        return f"eval.bench_{self.name}"

    @property
    def title(self) -> str:
        """Of the page."""
        return f"{self.name.upper()} side by side"


GPTQ = Bench("gptq", METHODS)


@dataclass(frozen=True)
class Setting:
    """What all rows have in common."""

    model: Path
    calibration: Path | None
    text: str
    num_samples: int
    seq_len: int
    windows: int
    window_tokens: int
    limit: float
    work: Path
    llmcompressor_python: Path
    autoawq_python: Path = Path(".venv-autoawq/bin/python")

    @property
    def windows_file(self) -> Path:
        """The calibration windows that every method gets."""
        return self.work / "windows" / "work" / "calibration" / "windows.safetensors"

    def overrides(self) -> list[str]:
        """This project's settings for the model and the calibration windows."""
        source = ["calibration=builtin"]
        if self.calibration is not None:
            source = ["calibration=text", f"calibration.path='{self.calibration}'"]
        counts = [f"calibration.num_samples={self.num_samples}", f"calibration.seq_len={self.seq_len}"]
        return [f"model.path='{self.model}'", *source, *counts, "device=cpu"]

    def evaluation(self) -> list[str]:
        """Options of ``python -m eval.perplexity``."""
        options = ["--text", self.text, "--windows", str(self.windows), "--seq-len", str(self.window_tokens)]
        if self.calibration is not None and self.text != "builtin" and self.calibration.samefile(self.text):
            options += ["--part", "heldout"]  # calibration took the other part of this very file
        return options


def make_windows(setting: Setting) -> dict[str, Any]:
    """Choose the calibration windows once, for all methods; returns the manifest's ``steps``.

    Raises:
        InputError: the model or the text is unusable.
    """
    directory = setting.work / "windows"
    command = quantize_command("gptq", directory, [*setting.overrides(), "stages=[load,calibrate]"])
    outcome = run_limited(
        command, log=setting.work / "logs" / "windows.log", limit=setting.limit, environment=environment(sys.executable)
    )
    if outcome.returncode != 0:
        raise InputError(f"no calibration windows: {outcome.last.removeprefix('error: ')}")
    steps: dict[str, Any] = read_json(directory / "manifest.json")["steps"]
    return steps


def environment(python: str) -> dict[str, str]:
    """A child's environment: CPU only, no network, and this checkout importable."""
    # Another interpreter has packages of its own, which this one's search path must not hide.
    inherited = os.environ.get("PYTHONPATH", "") if python == sys.executable else ""
    path = os.pathsep.join(filter(None, [str(PROJECT), inherited]))
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


@functools.cache
def package_version(package: str, python: str) -> str | None:
    """The version of a package in an interpreter; None where either is missing."""
    if python == sys.executable:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None
    code = f"from importlib.metadata import version; print(version({package!r}))"
    try:
        result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def interpreter(method: Method, setting: Setting) -> str:
    """The Python that runs a method."""
    # Not resolved: a virtual environment's python is a link, and what it links to knows nothing of the environment.
    own = {"llmcompressor": setting.llmcompressor_python, "autoawq": setting.autoawq_python}
    return str(own[method.package].absolute()) if method.package in own else sys.executable


def version_of(method: Method, setting: Setting) -> str | None:
    """The version of a method's package; None where it is not installed."""
    return __version__ if method.package == "quantize" else package_version(method.package, interpreter(method, setting))


def missing(method: Method, setting: Setting) -> str | None:
    """What a method lacks, in words; None when it can run."""
    if version_of(method, setting) is None:
        return "not installed (make peers)"
    if method.package == "llmcompressor" and package_version("compressed-tensors", sys.executable) is None:
        return "needs compressed-tensors to be loaded (pip install -e .)"
    return None


def quantize(method: Method, setting: Setting) -> Row:
    """Make a method's artifact: ``status`` (done, stopped, failed), and when done what it cost."""
    directory, log = setting.work / "runs" / method.name, setting.work / "logs" / f"{method.name}.log"
    own = method.package == "quantize"
    if own:
        command = own_command(method, setting, directory)
        artifact = directory / "variants" / method.recipe
    else:
        command = peer_command(method, setting, directory)
        artifact = directory / "artifact"
        directory.mkdir(parents=True, exist_ok=True)
    outcome = run_limited(command, log=log, limit=setting.limit, environment=environment(command[0]))
    if outcome.returncode != 0:
        return ended(outcome, setting.limit)
    costs = own_costs(directory, setting) if own else read_json(directory / "artifact.json")
    size = sum(file.stat().st_size for file in artifact.glob("*.safetensors"))
    return {"status": "done", "size_bytes": size, "artifact": str(artifact), **costs}


def own_command(method: Method, setting: Setting, directory: Path) -> list[str]:
    """This project's command line for a method."""
    overrides = [*setting.overrides(), *method.settings, ARTIFACT_STAGES]
    if method.group is not None:
        symmetric = str(method.symmetric).lower()
        overrides += [f"solver.bits={method.bits}", f"solver.group_size={method.group}", f"solver.symmetric={symmetric}"]
    return quantize_command(method.recipe, directory, overrides)


def peer_command(method: Method, setting: Setting, directory: Path) -> list[str]:
    """The command line of a peer's script."""
    module = f"eval.peers.{method.package}_{method.algorithm}"
    paths = [str(setting.model), str(setting.windows_file), str(directory / "artifact")]
    grid = [str(method.bits), str(method.group), str(method.symmetric).lower()]
    return [interpreter(method, setting), "-m", module, *paths, *grid, *method.settings]


def own_costs(directory: Path, setting: Setting) -> Row:
    """Seconds and peak memory of this project's steps from load to export, out of the manifest.

    Raises:
        InputError: the run calibrated on other windows than the peers.
    """
    steps = read_json(directory / "manifest.json")["steps"]
    used = steps["calibrate"]["result"].get("fingerprint") if "calibrate" in steps else None
    if used is not None and used != sha256_file(setting.windows_file):
        raise InputError(f"{directory} was calibrated on other windows than {setting.windows_file}")
    return {
        "seconds": sum(step["seconds"] for step in steps.values()),
        "peak_rss_bytes": max(step["peak_rss_bytes"] for step in steps.values()),
        "versions": {"quantize": __version__},
        "settings": {},
    }


def evaluate(method: Method, setting: Setting, artifact: Path) -> Row:
    """Measure an artifact's perplexity in a process of its own, within the limit as well."""
    log = setting.work / "logs" / f"{method.name}-perplexity.log"
    output = setting.work / "runs" / method.name / "perplexity.json"
    options = setting.evaluation()
    command = [sys.executable, "-m", "eval.perplexity", str(artifact), *options, "--device", "cpu", "--json", str(output)]
    outcome = run_limited(command, log=log, limit=setting.limit, environment=environment(sys.executable))
    if outcome.returncode != 0:
        return ended(outcome, setting.limit, "evaluation ")
    result = read_json(output)
    return {key: result[key] for key in ("ppl", "consumer", "protocol", "compute_dtype")}


def ended(outcome: Outcome, limit: float, what: str = "") -> Row:
    """The row of a process that did not finish: why, and how far it had come."""
    if outcome.returncode is None:
        return {"status": "stopped", "outcome": f"{what}stopped after {limit:g} s", "last": outcome.last, "limit": limit}
    return {"status": "failed", "outcome": f"{what}failed (exit code {outcome.returncode})", "last": outcome.last}
