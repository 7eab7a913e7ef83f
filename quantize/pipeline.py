"""The pipeline: which steps a recipe needs, which of them are finished, and running the rest in order.

load -> calibrate -> quantize -> export -> evaluate -> gate -> report -> publish. Load, calibrate and report are one step each,
the others one step a variant. A step's key hashes what its outcome depends on, so a re-run does only what a change of recipe
made stale, and a finished run does nothing.
"""

from __future__ import annotations

import functools
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console

from eval.allocation_chart import render_allocation
from eval.consumers import CONSUMERS
from eval.gate_run import failures, judge_variant, mark, remove_verdicts, write_verdicts
from eval.latency import speed_of
from eval.protocols import window_length
from eval.report import VariantResult, build_report, render_table, write_report
from eval.tasks_run import check_known, is_offline
from eval.tasks_scores import described, summary, with_differences
from exports.registry.secrets import redact
from quantize import stages
from quantize.allocate import allocate
from quantize.artifact import is_recorded, read_manifest, record_evaluation
from quantize.choices import override_from
from quantize.config import STAGES, RunConfig
from quantize.demo_model import demo_model
from quantize.errors import GateError, InputError
from quantize.files import atomic_path, disk_error, read_json, write_json, write_text
from quantize.keys import StepKeys
from quantize.manifest import Manifest, StepRecord, cpu_name, step_key, versions
from quantize.publishing import is_published, publish_variant
from quantize.run import Run, needs_calibration

log = logging.getLogger(__name__)


def run_pipeline(config: RunConfig) -> Path:
    """Carry out ``config.stages`` in ``config.output_dir``; returns that directory.

    Raises:
        InputError: bad input of any kind.
        GateError: everything was done, and a variant failed its gate.
    """
    directory = Path(config.output_dir)
    _prepare(directory)
    _check_stage_inputs(config)
    run = Run(config, directory, config.model.path or str(demo_model()))
    _check_context(run)
    manifest = Manifest(directory)
    pipeline = _Pipeline(run, manifest)
    manifest.describe(recipe=_recorded(config), seed=config.seed)
    recipe = redact(OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True))
    if not (directory / "recipe.yaml").exists() or (directory / "recipe.yaml").read_text() != recipe:
        write_text(directory / "recipe.yaml", recipe)
    for stage in STAGES:
        if stage in config.stages:
            pipeline.run_stage(stage)
    if pipeline.ran:
        log.info("done: %s", directory)
    else:
        log.info("nothing to do: %s is finished and unchanged", directory)
    if "report" in config.stages:
        # Piped output has no width of its own; the table's figures need about 120 columns.
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(render_table(read_json(directory / "report.json")))
        console.print(f"report: {directory / 'report.html'}", soft_wrap=True)
    for reference in pipeline.published:
        print(f"published: {reference}")
    if pipeline.failed:
        raise GateError("; ".join(pipeline.failed))
    return directory


def _prepare(directory: Path) -> None:
    """Make the run directory, see that it can be written to, and sweep up what a killed run left half-written."""
    if directory.is_file():
        raise InputError(f"output_dir={directory} is a file, not a directory; choose another output_dir")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise disk_error(directory, error) or error from error
    for leftover in [*directory.rglob(".*.tmp-*")]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _check_stage_inputs(config: RunConfig) -> None:
    """Refuse missing texts and unknown tasks before any work starts."""
    if config.eval.text != "builtin" and not Path(config.eval.text).is_file():
        raise InputError(f"eval.text={config.eval.text} does not exist; give a text file or builtin")
    if "evaluate" in config.stages and not all(is_offline(task) for task in config.eval.tasks):
        check_known(config.eval.tasks, [Path(config.eval.task_dir)] if config.eval.task_dir else [])


def _check_context(run: Run) -> None:
    """Refuse windows longer than the model's context before any work starts."""
    config = run.config.eval
    context = getattr(run.checkpoint.config.get_text_config(), "max_position_embeddings", None)
    length = window_length(config)
    if "evaluate" in run.config.stages and context and length + config.bos > context:
        raise InputError(
            f"eval.seq_len={length} exceeds the model's context of {context} tokens; use {context - config.bos} or less"
        )


def _recorded(config: RunConfig) -> dict[str, Any]:
    recipe = asdict(config)
    # Where the run lives and how much it says do not decide what it makes.
    for key in ("output_dir", "debug", "log_level", "stages", "publish"):
        recipe.pop(key)
    return recipe


class _Pipeline:
    """The steps of one run: their keys, and running those that are stale."""

    def __init__(self, run: Run, manifest: Manifest) -> None:
        self.run, self.manifest, self.config = run, manifest, run.config
        self.keys = StepKeys(run, manifest)
        self.ran = 0
        self.published: list[str] = []
        self.failed: list[str] = []  # a sentence on each variant that failed its gate
        self.allocated: set[str] = set()

    def run_stage(self, stage: str) -> None:
        """Run one stage's steps, as far as they are not finished."""
        if STAGES.index(stage) > STAGES.index("allocate"):
            self._use_allocations()
        if stage in ("load", "calibrate", "report"):
            self._step(stage, getattr(self.keys, stage)(), getattr(self, f"_{stage}"))
            return
        if stage in ("gate", "publish"):
            getattr(self, f"_{stage}_all")()
            return
        for name in self._in_order(stage):
            if stage == "quantize" and not self.keys.quantizes(name):
                continue
            if stage == "allocate" and not self.keys.allocates(name):
                continue
            key = getattr(self.keys, stage)(name)
            self._step(f"{stage}/{name}", key, functools.partial(getattr(self, f"_{stage}"), name, key))
            if stage == "evaluate":
                self._tell_artifact(name, self.manifest.result(f"evaluate/{name}"))

    def _gate_all(self) -> None:
        """Hold every variant that has limits against them; what fails is told when the run is done."""
        gated = self.keys.gated()
        for name in gated:
            if self.config.variants[name].gate.decode_ratio is not None:
                self._step(f"speed/{name}", self.keys.speed(name), functools.partial(self._speed, name))
                self._tell_artifact(name, self.manifest.result(f"speed/{name}"))
            self._step(f"gate/{name}", self.keys.gate(name), functools.partial(self._gate, name))
        results = [self.manifest.result(f"gate/{name}") for name in gated]
        if results:
            self._step("gate", step_key("gate", results), functools.partial(self._write_verdicts, results))
        else:
            remove_verdicts(self.run.directory)
        self.failed = failures(results)

    def _publish_all(self) -> None:
        """Publish every variant whose gate allows it; what is in the registry unchanged is left alone."""
        if self.config.publish.registry is None:
            return
        for name in self.config.variants:
            gate = self.keys.gate_result(name)
            if gate is not None and not gate["passed"] and not self.config.publish.force:
                log.warning("%s failed its gate and is not published; publish.force=true publishes it all the same", name)
                continue
            step, key = f"publish/{name}", self.keys.publish(name)
            if self.manifest.finished(step, key) and not is_published(self.run, name, self.manifest.result(step)):
                self.manifest.forget(step)
            self._step(step, key, functools.partial(self._publish, name))
            self.published.append(self.manifest.result(step)["reference"])

    def _publish(self, name: str, record: StepRecord) -> None:
        record.result = publish_variant(self.run, name, self.keys.gate_result(name))

    def _use_allocations(self) -> None:
        """From here on, variants have the grids that were chosen for their layers; the recipe's own overrides go before."""
        for name, variant in self.config.variants.items():
            if self.keys.allocates(name) and name not in self.allocated:
                chosen = self.keys.need(f"allocate/{name}", self.keys.allocate(name))["overrides"]
                overrides = [*variant.solver.overrides, *map(override_from, chosen)]
                self.config.variants[name] = replace(variant, solver=replace(variant.solver, overrides=overrides))
                self.allocated.add(name)

    def _in_order(self, stage: str) -> list[str]:
        """The variants; those to be evaluated after the one that they are compared with."""
        names = list(self.config.variants)
        return sorted(names, key=lambda name: name != self.keys.baseline()) if stage == "evaluate" else names

    def _step(self, step: str, key: str, action: Callable[[StepRecord], None]) -> None:
        if self.manifest.finished(step, key):
            log.debug("%s: finished", step)
            return
        log.info("%s ...", step)
        with self.manifest.recording(step, key) as record:
            action(record)
        self.ran += 1
        log.info("%s: %.1f s", step, self.manifest.entry(step)["seconds"])

    # Actions.

    def _load(self, record: StepRecord) -> None:
        stages.load(self.run, record)

    def _calibrate(self, record: StepRecord) -> None:
        if self.keys.calibrates():
            stages.calibrate(self.run, record)

    def _allocate(self, name: str, key: str, record: StepRecord) -> None:
        self.manifest.discard_changed(f"allocate/{name}", key)
        result = allocate(self.run, name, self.keys.sensitivities(name), record)
        chart = self.run.directory / "allocation" / f"{name}.png"
        with atomic_path(chart) as path:
            path.write_bytes(render_allocation(name, result))
        record.files.append(chart)

    def _quantize(self, name: str, key: str, record: StepRecord) -> None:
        self.manifest.discard_changed(f"quantize/{name}", key)
        stages.quantize(self.run, name, key, record)

    def _export(self, name: str, key: str, record: StepRecord) -> None:
        calibrated = needs_calibration(self.config.variants[name].solver)
        windows = self.manifest.result("calibrate") if calibrated else None
        stages.export(self.run, name, self.manifest.result("load"), windows, record)

    def _evaluate(self, name: str, key: str, record: StepRecord) -> None:
        """Measure in a process of its own: the memory figure is the consumer's, and the printed command repeats it."""
        output = self.run.work("evaluate", f"{name}.json")
        command = [
            sys.executable,
            "-m",
            "eval.perplexity",
            str(self.run.artifact(name)),
            *self.keys.evaluation_arguments(),
            *self.keys.reference_arguments(name),
        ]
        command += ["--cache", str(output.parent / "texts"), "--json", str(output), "--log-level", self.config.log_level]
        environment = {**os.environ, **CONSUMERS[self.config.variants[name].container].environment}
        if not all(is_offline(task) for task in self.config.eval.tasks) and "HF_HUB_OFFLINE" not in os.environ:
            environment.pop("HF_HUB_OFFLINE", None)  # the artifact is local files anyway; the tasks' data are not
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_package_root(), os.environ.get("PYTHONPATH", "")]))
        # Standard error is shared, so that the progress bar shows; on a pipe it is kept for the error message.
        shared = sys.stderr.isatty()
        result = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            stderr=None if shared else subprocess.PIPE,
            text=True,
            env=environment,
            check=False,
        )
        if result.returncode == 2:
            message = "see above" if shared else result.stderr.strip().splitlines()[-1].removeprefix("ERROR: ")
            raise InputError(f"evaluation of {name}: {message}")
        if result.returncode:
            raise RuntimeError(f"evaluation of {name} failed ({result.returncode}): {result.stderr or 'see above'}")
        record.files = [output, *([self.keys.reference] if self.keys.stores_reference(name) else [])]
        record.result = read_json(output)
        baseline = self.keys.baseline()
        if self.config.eval.tasks and baseline not in (None, name):
            reference = self.manifest.result(f"evaluate/{baseline}")["tasks"]
            record.result["tasks"] = with_differences(record.result["tasks"], reference)

    def _tell_artifact(self, name: str, figures: Mapping[str, Any]) -> None:
        """See that figures lie beside the artifact too, where they travel with it; others found there are kept."""
        directory = self.run.artifact(name)
        current = read_manifest(directory)["fingerprint"]
        if not is_recorded(directory, figures, current):
            record_evaluation(directory, figures, known=current)

    def _speed(self, name: str, record: StepRecord) -> None:
        baseline = self.keys.baseline()
        against = self.run.artifact(baseline) if baseline is not None else None
        record.result = {"speed": speed_of(self.run.artifact(name), against, device=str(self.run.device))}

    def _gate(self, name: str, record: StepRecord) -> None:
        baseline, output = self.keys.baseline(), self.run.work("gate", f"{name}.json")
        against = self.run.artifact(baseline) if baseline is not None else None
        limits = self.config.variants[name].gate
        record.result = judge_variant(self.run.artifact(name), limits, against, run=self.run.directory)
        write_json(output, record.result)
        record.files = [output]

    def _write_verdicts(self, results: Sequence[Mapping[str, Any]], record: StepRecord) -> None:
        record.files = write_verdicts(results, self.run.directory)

    def _report(self, record: StepRecord) -> None:
        loaded = self.manifest.result("load")
        evaluations = {name: self.manifest.result(f"evaluate/{name}") for name in self.config.variants}
        baseline = self.keys.baseline()
        reference = evaluations[baseline]["ppl"] if baseline else None
        results = [self._variant_result(name, evaluations[name], loaded, reference) for name in self.config.variants]
        protocol = {**next(iter(evaluations.values()))["protocol"]}
        protocol["compute dtype"] = next(iter(evaluations.values()))["compute_dtype"]
        if any(self.keys.compared(name) for name in self.config.variants):
            protocol["divergence"] = (
                f"from {baseline}, nats a token; its {self.config.eval.top_k} likeliest and the rest as one"
            )
        for task, found in next(iter(evaluations.values())).get("tasks", {}).items():
            protocol[task] = described(found) + (f"; ~ within noise of {baseline}" if baseline else "")
        protocol["size"] = "safetensors files"
        protocol["peak RSS"] = "consumer process while loading"
        model = {"name": Path(loaded["path"]).name, "path": loaded["path"], "parameters": loaded["parameters"]}
        environment = {
            **versions(),
            "cpu": cpu_name(),
            "threads": str(torch.get_num_threads()),
            "seed": str(self.config.seed),
        }
        report = build_report(results, model=model, protocol=protocol, environment=environment)
        record.files = write_report(report, self.run.directory)

    def _variant_result(
        self, name: str, evaluation: dict[str, Any], loaded: dict[str, Any], reference: float | None
    ) -> VariantResult:
        variant, exported = self.config.variants[name], self.manifest.entry(f"export/{name}")
        quantized = self.manifest.entry(f"quantize/{name}")["seconds"] if self.keys.quantizes(name) else 0.0
        ppl = evaluation["ppl"] if evaluation["ppl"] is not None else float("inf")
        divergence = evaluation.get("divergence") or {}
        artifact = os.path.relpath(self.run.artifact(name), self.run.directory)
        arguments = shlex.join(
            [str(self.run.artifact(name)), *self.keys.evaluation_arguments(), *self.keys.reference_arguments(name)]
        )
        return VariantResult(
            name=name,
            solver=variant.solver.name,
            container=variant.container,
            bits=exported["result"]["bits"],
            bits_per_weight=exported["result"]["bits_per_weight"],
            size_bytes=exported["result"]["size_bytes"],
            compression=loaded["bytes"] / exported["result"]["size_bytes"],
            peak_rss_bytes=evaluation["peak_rss_bytes"],
            ppl=ppl,
            ppl_ratio=ppl / reference if reference else None,
            kld_mean=divergence.get("kld_mean"),
            top1_agreement=divergence.get("top1_agreement"),
            tasks={task: summary(found) for task, found in evaluation.get("tasks", {}).items()},
            seconds=round(quantized + exported["seconds"], 3),
            consumer=evaluation["consumer"],
            path=artifact,
            gate=mark(verdicts[name]) if name in (verdicts := self.keys.gate_results()) else None,
            command=f"python -m eval.perplexity {arguments}",
        )


def _package_root() -> str:
    return str(Path(__file__).resolve().parent.parent)
