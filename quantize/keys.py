"""Step keys: for every step of a run, a hash of all that its outcome depends on.

A finished step whose key is still the wanted one is not run again (:class:`quantize.manifest.Manifest`). Asking for a key
demands that the steps before it are finished, so a stage run alone against an unfinished directory is told what it lacks.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from calibration.sources import matching_files
from exports.containers import CONTAINERS
from quantize import artifact
from quantize.artifact import EVALUATION, MANIFEST
from quantize.choices import budgeted
from quantize.config import RunConfig, SolverConfig
from quantize.errors import InputError
from quantize.files import sha256_file
from quantize.limits import set_limits
from quantize.manifest import Manifest, step_key, versions
from quantize.run import Run, needs_calibration, solves
from quantize.solvers import SOLVERS


class StepKeys:
    """The keys of one run's steps."""

    def __init__(self, run: Run, manifest: Manifest) -> None:
        self.run, self.manifest, self.config = run, manifest, run.config

    def need(self, step: str, key: str) -> dict[str, Any]:
        """The result of an earlier step, which must be finished under ``key``."""
        if not self.manifest.finished(step, key):
            stage = step.split("/")[0]
            raise InputError(
                f"{self.run.directory} has no finished {step} for these settings; add {stage} to stages, or name the "
                "output_dir and settings it was made with"
            )
        return self.manifest.result(step)

    def quantizes(self, name: str) -> bool:
        """Whether a variant has a quantize step: not where weights stay as they are, nor where its container quantizes."""
        return solves(self.config.variants[name])

    def calibrates(self) -> bool:
        """Whether any variant needs calibration windows."""
        return any(needs_calibration(variant.solver) for variant in self.config.variants.values())

    def load(self) -> str:
        """The checkpoint's files, by name, size and time."""
        files = self.run.checkpoint.fingerprint_files()
        return step_key("load", [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files])

    def calibrate(self) -> str:
        """The checkpoint's fingerprint (its tokenizer) and the text; of no windows, nothing."""
        if not self.calibrates():
            return step_key("calibrate")
        settings = asdict(self.config.calibration)
        for key in ("activations", "batch_tokens"):
            settings.pop(key)
        checkpoint = self.need("load", self.load())["fingerprint"]
        return step_key("calibrate", checkpoint, settings, text_stamp(settings["path"]), self.config.seed)

    def allocates(self, name: str) -> bool:
        """Whether a variant's bits are chosen layer by layer."""
        return budgeted(self.config.variants[name].solver) and self.quantizes(name)

    def sensitivities(self, name: str) -> str:
        """What a choice of bits would cost: all that quantizing depends on but the budget. Of the recipe's own solver."""
        solver = replace(self.config.variants[name].solver, budget_bits=None, budget_bytes=None)
        return step_key(
            "sensitivities", self._quantized_by(name, solver), self.config.variants[name].container, self.config.seed
        )

    def allocate(self, name: str) -> str:
        """What each choice would cost, and the budget."""
        solver = self.config.variants[name].solver
        return step_key("allocate", self.sensitivities(name), solver.budget_bits, solver.budget_bytes)

    def quantize(self, name: str) -> str:
        """Checkpoint, solver (with the grids that were allocated), and calibration windows where the solver uses them."""
        return step_key("quantize", *self._quantized_by(name, self.config.variants[name].solver))

    def _quantized_by(self, name: str, solver: SolverConfig) -> list[Any]:
        config, variant = self.config, self.config.variants[name]
        parts: list[Any] = [self.need("load", self.load())["fingerprint"], asdict(solver), repr(self.run.grid(variant))]
        if variant.grid is not None:
            parts.append(repr(self.run.stored(variant)))
        if needs_calibration(variant.solver):
            parts.append(self.need("calibrate", self.calibrate())["fingerprint"])
            parts += [config.calibration.batch_tokens, config.quality, config.model.compute_dtype, self.run.device.type]
        return parts

    def export(self, name: str) -> str:
        """What was quantized, and the container."""
        variant = self.config.variants[name]
        stored: list[Any] = [artifact.SCHEMA, variant.container, variant.dtype]
        if CONTAINERS[variant.container].file_types:
            stored.append(repr(self.run.stored(variant)))
        if not self.quantizes(name):
            delegated = SOLVERS[variant.solver.name].quantizes
            parts = [asdict(variant.solver), self.run.device.type] if delegated else []
            return step_key("export", self.need("load", self.load())["fingerprint"], *stored, *parts)
        key = self.quantize(name)
        self.need(f"quantize/{name}", key)
        return step_key("export", key, *stored)

    def baseline(self) -> str | None:
        """The variant that the others are compared with: the first that is not quantized."""
        return baseline_of(self.config)

    def compared(self, name: str) -> bool:
        """Whether a variant's divergence from the baseline is measured."""
        return self.config.eval.divergence and self.baseline() not in (None, name)

    def stores_reference(self, name: str) -> bool:
        """Whether a variant's predictions are stored, because another is compared with them."""
        return name == self.baseline() and any(self.compared(other) for other in self.config.variants)

    def evaluate(self, name: str) -> str:
        """The artifact's bytes and the protocol; and what it is compared with."""
        self.need(f"export/{name}", self.export(name))
        files = self.manifest.entry(f"export/{name}")["files"]
        parts = [files, self.evaluation_arguments(), self._text_stamp(), versions()]
        if self.stores_reference(name):
            parts.append(["reference", self.config.eval.top_k])
        if self.compared(name):
            baseline = str(self.baseline())
            self.need(f"evaluate/{baseline}", self.evaluate(baseline))
            stored = self.manifest.entry(f"evaluate/{baseline}")["files"]
            parts.append(["against", stored[str(self.reference.relative_to(self.run.directory))]["sha256"]])
        if self.config.eval.tasks:
            parts.append(["tasks", folder_stamp(self.config.eval.task_dir)])
            if (first := self.baseline()) not in (None, name):
                accuracy = self.need(f"evaluate/{first}", self.evaluate(str(first)))["tasks"]
                parts.append(["accuracy against", accuracy])
        return step_key("evaluate", *parts)

    @property
    def reference(self) -> Path:
        """The file of the baseline's predictions."""
        return self.run.work("evaluate", "reference.npz")

    def reference_arguments(self, name: str) -> list[str]:
        """Options of ``python -m eval.perplexity`` that store the baseline's predictions, or compare with them."""
        if self.stores_reference(name):
            return ["--save-reference", str(self.reference), "--top-k", str(self.config.eval.top_k)]
        return ["--reference", str(self.reference)] if self.compared(name) else []

    def gated(self) -> list[str]:
        """The variants that have limits; the baseline has none, being what others are compared with."""
        return [name for name, v in self.config.variants.items() if name != self.baseline() and set_limits(v.gate)]

    def speed(self, name: str) -> str:
        """The bytes of the artifact and the baseline's, which are run in turn."""
        names = [name, *([first] if (first := self.baseline()) is not None else [])]
        return step_key("speed", [self._measured(each)[0] for each in names], versions(), str(self.run.device))

    def gate(self, name: str) -> str:
        """The limits, and the figures of the artifact and the baseline as they lie beside them."""
        names = [name, *([first] if (first := self.baseline()) is not None else [])]
        return step_key("gate", set_limits(self.config.variants[name].gate), [self._measured(each) for each in names])

    def _measured(self, name: str) -> list[str]:
        """Hashes of an evaluated artifact's manifest and figures."""
        self.need(f"evaluate/{name}", self.evaluate(name))
        figures = self.run.artifact(name) / EVALUATION
        return [sha256_file(self.run.artifact(name) / MANIFEST), sha256_file(figures) if figures.is_file() else ""]

    def report(self) -> str:
        """Every evaluation, and what the gate found."""
        names = list(self.config.variants)
        keys = [self.evaluate(name) for name in names]
        for name, key in zip(names, keys, strict=True):
            self.need(f"evaluate/{name}", key)
        return step_key("report", names, keys, *([found] if (found := self.gate_results()) else []))

    def gate_results(self) -> dict[str, Any]:
        """What the gate found of each variant, as far as it has been run for these limits and figures."""
        finished = [name for name in self.gated() if self.manifest.finished(f"gate/{name}", self.gate(name))]
        return {name: self.manifest.result(f"gate/{name}") for name in finished}

    def gate_result(self, name: str) -> dict[str, Any] | None:
        """What the gate found of a variant, with ``passed``; None where it has no limits.

        Raises:
            InputError: it has limits, and the gate has not been run for them.
        """
        return self.need(f"gate/{name}", self.gate(name)) if name in self.gated() else None

    def publish(self, name: str) -> str:
        """The artifact, its figures and its gate, and where it goes. The report is published with it, as it is by then."""
        self.need("report", self.report())
        files = [sha256_file(self.run.artifact(name) / file) for file in (MANIFEST, EVALUATION)]
        if (key := self.config.publish.sign_key) is not None:
            files.append(sha256_file(Path(key)))
        return step_key("publish", files, self.gate_result(name), asdict(self.config.publish))

    def _text_stamp(self) -> list[Any]:
        return text_stamp(None if self.config.eval.text == "builtin" else self.config.eval.text)

    def evaluation_arguments(self) -> list[str]:
        """Options of ``python -m eval.perplexity`` that carry out the recipe's protocol."""
        config = self.config.eval
        arguments = ["--text", config.text, "--protocol", config.protocol, "--windows", str(config.windows)]
        if config.seq_len is not None:
            arguments += ["--seq-len", str(config.seq_len)]
        if config.stride is not None:
            arguments += ["--stride", str(config.stride)]
        if config.bos:
            arguments.append("--bos")
        if config.text == "builtin" or self._calibrated_on(config.text):
            arguments += ["--part", "heldout", "--heldout-fraction", str(self.config.calibration.heldout_fraction)]
        if config.tasks:
            arguments += ["--tasks", ",".join(config.tasks)]
            arguments += ["--task-dir", config.task_dir] if config.task_dir else []
            arguments += ["--task-limit", str(config.task_limit)] if config.task_limit else []
        return [*arguments, "--device", str(self.run.device)]

    def _calibrated_on(self, text: str) -> bool:
        calibration = self.config.calibration
        if calibration.source != "text" or calibration.path is None:
            return False
        return any(file.samefile(text) for file in matching_files(calibration.path))


def baseline_of(config: RunConfig) -> str | None:
    """The first variant of a recipe that is not quantized; None where all are."""
    return next((name for name, v in config.variants.items() if not SOLVERS[v.solver.name].quantizes), None)


def folder_stamp(path: str | None) -> list[Any]:
    """Names, sizes and times of the files below a folder."""
    files = sorted(file for file in Path(path).rglob("*") if file.is_file()) if path else []
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def text_stamp(path: str | None) -> list[Any]:
    """Names, sizes and times of the files behind a text path: tells cheaply that a text has changed."""
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in matching_files(path)] if path else []
