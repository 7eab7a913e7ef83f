"""What a recipe's values may be. Hydra has checked keys and types by then; nothing has been loaded yet."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from quantize.config import (
    ACTIVATIONS,
    CALIBRATION_SOURCES,
    DTYPES,
    INPUT_ACTIVATIONS,
    LOG_LEVELS,
    OBSERVERS,
    PROTOCOLS,
    QUALITIES,
    SEARCH_LOSSES,
    SENSITIVITIES,
    STAGES,
    CalibrationConfig,
    EvalConfig,
    RunConfig,
    SolverConfig,
    VariantConfig,
)
from quantize.errors import InputError
from quantize.limits import DIVERGENCES, check_limits, set_limits


def validate(composed: Any) -> RunConfig:
    """Turn Hydra's composed config into a :class:`RunConfig` whose values are all possible.

    Raises:
        InputError: names the first key with an impossible value, what is allowed, and a value that would work.
    """
    config: RunConfig = OmegaConf.to_object(composed)  # type: ignore[assignment]
    _one_of("quality", config.quality, tuple(QUALITIES))
    _one_of("log_level", config.log_level, LOG_LEVELS)
    for stage in config.stages:
        _one_of("stages", stage, STAGES)
    if not config.stages:
        raise InputError(f"stages=[] runs nothing; name some of {', '.join(STAGES)}")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", config.device):
        raise InputError(f"device={config.device} is unknown; use auto, cpu, cuda, cuda:0 or mps")
    if config.seed < 0:
        raise InputError(f"seed={config.seed} is negative; use 0 or more")
    _one_of("model.compute_dtype", config.model.compute_dtype, ("auto", *DTYPES))
    _check_calibration(config.calibration)
    check_eval(config.eval)
    if not config.variants:
        raise InputError("variants={} makes nothing; a recipe lists at least one variant")
    for name, variant in config.variants.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise InputError(f"variants.{name}: a variant's name becomes a folder; use letters, digits, '.', '_' and '-'")
        _check_variant(f"variants.{name}", variant)
    _check_gate(config)
    _check_publish(config)
    return config


def _check_gate(config: RunConfig) -> None:
    """Refuse limits that are impossible, or on figures that this recipe does not measure."""
    check_limits("gate", config.gate)
    for name, variant in config.variants.items():
        check_limits(f"variants.{name}.gate", variant.gate)
    if not {"gate", "evaluate"} <= set(config.stages):
        return
    from quantize.keys import baseline_of  # late, as in _check_variant

    baseline = baseline_of(config)
    for name, variant in config.variants.items():
        limits, key = set_limits(variant.gate), f"variants.{name}.gate"
        if name == baseline:
            continue
        compared = [limit for limit in limits if limit not in ("size_bytes", "peak_rss_bytes")]
        if compared and baseline is None:
            raise InputError(
                f"{key}.{compared[0]} compares with an unquantized variant, and the recipe has none; add "
                "'+variants.fp16={solver: {name: none}, container: safetensors}'"
            )
        if not config.eval.divergence and (diverging := [limit for limit in limits if limit in DIVERGENCES]):
            raise InputError(f"{key}.{diverging[0]} is measured with eval.divergence=true; it is false")
        for task in limits.get("task_drop", {}):
            if task not in config.eval.tasks:
                raise InputError(f"{key}.task_drop.{task}: eval.tasks={config.eval.tasks} lacks it; add it there")


def _check_publish(config: RunConfig) -> None:
    if config.publish.registry is not None:
        from quantize.publishing import check_publish  # late: the registries are not wanted where nothing is published

        check_publish(config)


def _check_calibration(config: CalibrationConfig) -> None:
    _one_of("calibration.source", config.source, CALIBRATION_SOURCES)
    _one_of("calibration.activations", config.activations, ACTIVATIONS)
    if config.source == "text" and not config.path:
        raise InputError("calibration=text needs calibration.path=FILE or a glob like 'texts/*.txt'")
    if config.source == "builtin" and config.path:
        raise InputError(f"calibration.path={config.path} is not used by calibration=builtin; say calibration=text as well")
    _at_least("calibration.num_samples", config.num_samples, 1, 64)
    _at_least("calibration.seq_len", config.seq_len, 2, 512)
    _at_least("calibration.batch_tokens", config.batch_tokens, 1, 2048)
    if not 0 < config.heldout_fraction < 1:
        raise InputError(f"calibration.heldout_fraction={config.heldout_fraction} is not inside (0, 1); use 0.2")


def check_eval(config: EvalConfig) -> None:
    """Refuse an impossible perplexity protocol.

    Raises:
        InputError: names the key, what is allowed, and a value that would work.
    """
    _one_of("eval.protocol", config.protocol, tuple(PROTOCOLS))
    if config.windows != -1:
        _at_least("eval.windows", config.windows, 1, 16)
    if config.seq_len is not None:
        # Of two tokens, llama.cpp scores none.
        _at_least("eval.seq_len", config.seq_len, 3 if config.protocol == "llamacpp" else 2, PROTOCOLS[config.protocol])
    _at_least("eval.top_k", config.top_k, 1, 256)
    _check_tasks(config)
    free = ("windows", "strided")
    if config.protocol not in free and (config.bos or config.stride is not None):
        key = "eval.bos=true" if config.bos else f"eval.stride={config.stride}"
        raise InputError(
            f"{key} is not for eval.protocol={config.protocol}, which decides that itself; use {' or '.join(free)}"
        )
    length = config.seq_len or PROTOCOLS[config.protocol]
    if config.stride is not None and not 1 <= config.stride <= length:
        raise InputError(f"eval.stride={config.stride} is not in 1..eval.seq_len={length}; leave it null or halve it")


def _check_tasks(config: EvalConfig) -> None:
    for name in config.tasks:
        if not name.strip() or "," in name or config.tasks.count(name) > 1:
            raise InputError(f"eval.tasks={config.tasks}: {name!r} is no name, or there twice; use names such as [builtin]")
    if config.task_limit is not None:
        _at_least("eval.task_limit", config.task_limit, 1, 100)
    if config.task_dir is not None and not Path(config.task_dir).is_dir():
        raise InputError(f"eval.task_dir={config.task_dir} is no folder; give one with lm-eval's task YAML files, or null")


def _check_variant(key: str, variant: VariantConfig) -> None:
    # Late, because the registries import torch, and a wrong key elsewhere should be told at once.
    from exports.containers import CONTAINERS
    from quantize.grids import Grid
    from quantize.run import override_grid
    from quantize.solvers import SOLVERS

    solver = variant.solver
    _one_of(f"{key}.solver.name", solver.name, tuple(SOLVERS))
    _one_of(f"{key}.container", variant.container, tuple(CONTAINERS))
    entry = SOLVERS[solver.name]
    # A container whose own program quantizes is for the solvers that name it, and they for it alone.
    delegates = {other.container for other in SOLVERS.values()}
    fits = [
        name
        for name, kind in CONTAINERS.items()
        if name not in delegates and (kind.quantized == entry.quantizes or kind.dense) and (entry.blocks or not kind.file_types)
    ]
    fits = [entry.container] if entry.container else fits
    if variant.container not in fits:
        raise InputError(
            f"{key}.container={variant.container} cannot hold what solver.name={solver.name} makes; use {' or '.join(fits)}"
        )
    if variant.dtype is not None:
        _one_of(f"{key}.dtype", variant.dtype, DTYPES)
    _check_file_type(key, variant)
    _check_budget(key, variant)
    if entry.quantizes:
        Grid(solver.bits, solver.group_size, solver.symmetric)
        _check_inputs(key, variant)
    _check_bitsandbytes(f"{key}.solver", solver, entry.container, entry.bits)
    for override in solver.overrides:
        _check_pattern(f"{key}.solver.overrides", override.match)
        override_grid(solver, override)
    if solver.desc_act and solver.act_group_aware:
        raise InputError(
            f"{key}.solver: desc_act and act_group_aware are two orders of the same columns; use act_group_aware=true "
            "with desc_act=false"
        )
    if solver.search_steps is not None and solver.search_steps < 0:
        raise InputError(f"{key}.solver.search_steps={solver.search_steps} is negative; use 0 (min-max), 40 or null")
    if solver.gptaq_alpha is not None and not 0 <= solver.gptaq_alpha <= 1:
        raise InputError(f"{key}.solver.gptaq_alpha={solver.gptaq_alpha} is not in [0, 1]; use 0 (off), 1 (full) or null")
    if solver.tune_epochs is not None and solver.tune_epochs < 0:
        raise InputError(f"{key}.solver.tune_epochs={solver.tune_epochs} is negative; use 0, 2 or null")
    if not 0 < solver.damp_percent < 1:
        raise InputError(f"{key}.solver.damp_percent={solver.damp_percent} is not inside (0, 1); use 0.01")
    _at_least(f"{key}.solver.block_size", solver.block_size, 1, 128)
    _at_least(f"{key}.solver.refits", solver.refits, 0, 2)
    for pattern in solver.skip:
        _check_pattern(f"{key}.solver.skip", pattern)


def _check_file_type(key: str, variant: VariantConfig) -> None:
    """What concerns containers whose files come in types, each with a grid of its own."""
    from exports.containers import CONTAINERS
    from exports.gguf import DENSE_TYPES
    from exports.gguf_types import TYPES
    from quantize.solvers import SOLVERS

    types, quantizes = CONTAINERS[variant.container].file_types, SOLVERS[variant.solver.name].quantizes
    named = {name: getattr(variant, name) for name in ("grid", "token_embedding_type", "output_tensor_type")}
    if not types:
        given = [name for name, value in named.items() if value is not None] + ["pure"] * variant.pure
        if given:
            raise InputError(f"{key}.{given[0]} is for container=gguf; {variant.container} takes solver.bits and group_size")
        return
    dense = tuple(name.lower() for name in DENSE_TYPES)
    fits = tuple(name for name in types if (name not in dense) == quantizes)
    if variant.grid is not None or quantizes:
        _one_of(f"{key}.grid", str(variant.grid), fits)
    for name in ("token_embedding_type", "output_tensor_type"):
        if named[name] is not None:
            _one_of(f"{key}.{name}", named[name], tuple(kind.lower() for kind in TYPES))
    if variant.solver.overrides:
        raise InputError(f"{key}.solver.overrides: {variant.grid} says what layers get; use [], or solver.skip for F16 layers")


def _check_inputs(key: str, variant: VariantConfig) -> None:
    """What concerns quantized inputs, and the groups a container can store."""
    from exports.containers import CONTAINERS
    from quantize.run import grids_of

    solver, container = variant.solver, CONTAINERS[variant.container]
    _one_of(f"{key}.solver.input_activations", solver.input_activations, INPUT_ACTIVATIONS)
    _one_of(f"{key}.solver.observer", solver.observer, OBSERVERS)
    if not 50 < solver.percentile <= 100:
        raise InputError(f"{key}.solver.percentile={solver.percentile} is not in (50, 100]; use 99.99")
    alpha = solver.smoothquant_alpha
    if alpha is not None and not 0 <= alpha <= 1:
        raise InputError(f"{key}.solver.smoothquant_alpha={alpha} is not in [0, 1]; use 0.5, or null to search")
    if solver.input_activations != "none":
        if not container.quantized_inputs:
            fits = [name for name, entry in CONTAINERS.items() if entry.quantized_inputs]
            raise InputError(
                f"{key}.container={variant.container} has no place for input_activations={solver.input_activations}; "
                f"use {' or '.join(fits)}"
            )
        if any(grid.bits != 8 or not grid.symmetric or grid.group_size != -1 for grid in grids_of(solver)):
            raise InputError(
                f"{key}.solver.input_activations={solver.input_activations} needs bits=8, group_size=-1 and symmetric=true: "
                "kernels multiply whole rows of 8-bit integers"
            )
    _check_scaling(f"{key}.solver", solver)
    if solver.lm_head and not container.head:
        raise InputError(f"{key}.container={variant.container} leaves the output embedding dense; use solver.lm_head=false")
    if not container.mixed_grids and len({(grid.bits, grid.group_size) for grid in grids_of(solver)}) > 1:
        raise InputError(
            f"{key}.container={variant.container} has one bits and one group_size for all layers; use solver.overrides=[], or "
            "solver.skip for dense layers"
        )
    grids = grids_of(solver)
    mixed = len({(grid.bits, grid.group_size) for grid in grids}) > 1
    if variant.container == "compressed-tensors" and mixed and not all(grid.symmetric for grid in grids):
        raise InputError(
            f"{key}.container=compressed-tensors: of layers on several grids with zero points transformers misreads all but "
            "the first grid's; use solver.symmetric=true, or container=gptq"
        )
    ordered = "gptq" in solver.name and solver.desc_act and not solver.static_groups and not container.file_types
    if ordered and not container.shuffled_groups and any(grid.group_size != -1 for grid in grids_of(solver)):
        raise InputError(
            f"{key}.container={variant.container} stores groups of consecutive columns; use solver.static_groups=true, or "
            "solver.act_group_aware=true with solver.desc_act=false"
        )


def _check_budget(key: str, variant: VariantConfig) -> None:
    """What concerns bits that are chosen layer by layer."""
    from exports.containers import CONTAINERS
    from quantize.choices import budgeted, candidate_grids
    from quantize.solvers import SOLVERS

    solver, entry = variant.solver, SOLVERS[variant.solver.name]
    _one_of(f"{key}.solver.sensitivity", solver.sensitivity, SENSITIVITIES)
    _at_least(f"{key}.solver.sensitivity_windows", solver.sensitivity_windows, 1, 4)
    candidates = candidate_grids(solver)
    if not budgeted(solver) or not entry.quantizes:
        return
    if solver.budget_bits is not None and solver.budget_bytes is not None:
        raise InputError(f"{key}.solver: budget_bits and budget_bytes are two budgets; set one of them to null")
    least = min(grid.bits for grid in candidates)
    if solver.budget_bits is not None and not least <= solver.budget_bits < float("inf"):
        raise InputError(f"{key}.solver.budget_bits={solver.budget_bits} is below the least of bit_choices; use {least + 1.5}")
    if solver.budget_bytes is not None:
        _at_least(f"{key}.solver.budget_bytes", solver.budget_bytes, 1, 60_000_000)
    kind = CONTAINERS[variant.container]
    if entry.container is not None or kind.file_types or not kind.mixed_grids:
        fits = [name for name, other in CONTAINERS.items() if other.mixed_grids and other.quantized and not other.file_types]
        fits = [name for name in fits if all(name != delegate.container for delegate in SOLVERS.values())]
        raise InputError(
            f"{key}.container={variant.container} takes no bits layer by layer; use {' or '.join(fits)}, or "
            "solver.budget_bits=null"
        )
    if solver.lm_head:
        raise InputError(f"{key}.solver.lm_head=true, but a budget is for layers inside the blocks; use false")


def _check_scaling(key: str, solver: SolverConfig) -> None:
    """What concerns AWQ's scales."""
    from quantize.solvers import SOLVERS

    _one_of(f"{key}.search_loss", solver.search_loss, SEARCH_LOSSES)
    _at_least(f"{key}.alpha_steps", solver.alpha_steps, 1, 20)
    if solver.smoothquant and SOLVERS[solver.name].find_scales is not None:
        raise InputError(f"{key}.smoothquant=true, but {solver.name} scales the same norms by its own measure; use false")


def _check_bitsandbytes(key: str, solver: SolverConfig, program: str | None, bits: int | None) -> None:
    """Refuse an impossible threshold, and what a program that quantizes by itself does not take from a recipe."""
    if not 0 <= solver.outlier_threshold < float("inf"):
        raise InputError(f"{key}.outlier_threshold={solver.outlier_threshold} is not in [0, inf); use 6.0, or 0 for none")
    if program is None:
        return
    if solver.bits != bits:
        raise InputError(f"{key}.bits={solver.bits} is not what {key}.name={solver.name} makes; use {bits}")
    if solver.lm_head:
        raise InputError(f"{key}.lm_head=true, but {program} leaves the output embedding dense; use false")
    if solver.smoothquant:
        raise InputError(f"{key}.smoothquant=true, but {program} takes the weights as they are; use false")
    if solver.overrides:
        raise InputError(f"{key}.overrides: {program} has one grid for all layers; use [], or solver.skip for dense ones")


def _check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{key}: {pattern!r} is no regular expression ({error})") from error


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{key}={value} is unknown; use one of {', '.join(allowed)}")


def _at_least(key: str, value: int, least: int, example: int) -> None:
    if value < least:
        raise InputError(f"{key}={value} is below {least}; use {example}")
