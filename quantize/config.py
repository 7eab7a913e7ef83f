"""Structured configs: every key a recipe may set, its type, its default and what is allowed.

Hydra checks keys and types against these dataclasses while composing; :mod:`quantize.checks` checks values. Both happen before
anything is loaded.

Variants inherit: a variant's solver field that the recipe leaves out is an interpolation of the top-level ``solver`` field,
so ``solver.bits=3`` on the command line reaches every variant that does not set its own bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import II, MISSING

from quantize.limits import GateConfig, VariantGateConfig

STAGES = ("load", "calibrate", "allocate", "quantize", "export", "evaluate", "gate", "report", "publish")
CALIBRATION_SOURCES = ("builtin", "text", "wikitext2", "c4", "pile")
# What `quality` means for solver fields left null; docs/gptq.md has the figures these were chosen by.
QUALITIES: dict[str, dict[str, Any]] = {
    "fast": {"search_steps": 20, "gptaq_alpha": 0.0, "tune_epochs": 0},
    "balanced": {"search_steps": 40, "gptaq_alpha": 1.0, "tune_epochs": 0},
    "best": {"search_steps": 40, "gptaq_alpha": 1.0, "tune_epochs": 2},
}
ACTIVATIONS = ("memory", "disk")
INPUT_ACTIVATIONS = ("none", "dynamic", "static")
OBSERVERS = ("minmax", "percentile", "mse")
SENSITIVITIES = ("estimated", "measured")
SEARCH_LOSSES = ("layer", "module")
DTYPES = ("float32", "bfloat16", "float16")
# Protocols of perplexity (eval/protocols.py), and the tokens in a window where `eval.seq_len` is null.
PROTOCOLS = {"windows": 1024, "gptq": 2048, "llamacpp": 512, "strided": 1024, "wikitext": 2048}
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass
class ModelConfig:
    """``model``: the checkpoint to quantize."""

    path: str | None = None  # directory | FILE.gguf | hub id; null: the demo model
    compute_dtype: str = "auto"  # of calibration forwards: auto | float32 | bfloat16 | float16


@dataclass
class CalibrationConfig:
    """``calibration``: which text the solvers see."""

    source: str = "builtin"
    path: str | None = None  # text: file or glob; data sets: a local mirror instead of the hub
    num_samples: int = 64
    seq_len: int = 512
    heldout_fraction: float = 0.2
    chat_template: bool = False
    activations: str = "memory"  # memory | disk (spill hidden states; slower, for models larger than RAM)
    batch_tokens: int = 2048  # tokens in one forward


@dataclass
class OverrideConfig:
    """An entry of ``solver.overrides``: another grid for the layers whose full name it matches; the first match counts."""

    match: str = MISSING  # regular expression, searched for in the layer's full name
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None


@dataclass
class SolverConfig:
    """``solver``: how codes are chosen on the grid."""

    name: str = "gptq"
    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    desc_act: bool = True
    static_groups: bool = False
    act_group_aware: bool = False
    damp_percent: float = 0.01
    true_sequential: bool = True
    block_size: int = 128
    outlier_threshold: float = 6.0  # llm_int8
    double_quant: bool = False  # nf4
    refits: int = 0  # gptq: times that scales are fitted to the codes and the columns rounded anew
    # null: as `quality` says
    search_steps: int | None = None
    gptaq_alpha: float | None = None
    tune_epochs: int | None = None
    input_activations: str = "none"  # none | dynamic (8 bits, a scale for each token) | static (8 bits, one scale for all)
    observer: str = "minmax"  # of static ranges: minmax | percentile | mse
    percentile: float = 99.99  # of |x|, for observer=percentile
    smoothquant: bool = False
    smoothquant_alpha: float | None = None  # null: searched for each group of layers
    alpha_steps: int = 20  # awq: strengths of scaling that are tried before the best is refined
    search_loss: str = "layer"  # awq: layer | module (by whose outputs scales are judged)
    lm_head: bool = False
    skip: list[str] = field(default_factory=list)  # besides the routers of experts, which always stay as they are
    overrides: list[OverrideConfig] = field(default_factory=list)
    # Bits chosen layer by layer: mean bits of a quantized weight, or bytes of all of them, scales and zero points included.
    budget_bits: float | None = None
    budget_bytes: int | None = None
    bit_choices: list[Any] = field(default_factory=lambda: [3, 4, 8])  # bits, or {bits, group_size}
    sensitivity: str = "estimated"  # estimated | measured: what each choice does to the predictions
    sensitivity_windows: int = 4  # calibration windows by which that is judged


@dataclass
class VariantSolverConfig(SolverConfig):
    """A variant's solver: whatever it does not set comes from the top-level ``solver``."""

    name: str = II("solver.name")
    bits: int = II("solver.bits")
    group_size: int = II("solver.group_size")
    symmetric: bool = II("solver.symmetric")
    desc_act: bool = II("solver.desc_act")
    static_groups: bool = II("solver.static_groups")
    act_group_aware: bool = II("solver.act_group_aware")
    damp_percent: float = II("solver.damp_percent")
    true_sequential: bool = II("solver.true_sequential")
    block_size: int = II("solver.block_size")
    outlier_threshold: float = II("solver.outlier_threshold")
    double_quant: bool = II("solver.double_quant")
    refits: int = II("solver.refits")
    search_steps: int | None = II("solver.search_steps")
    gptaq_alpha: float | None = II("solver.gptaq_alpha")
    tune_epochs: int | None = II("solver.tune_epochs")
    input_activations: str = II("solver.input_activations")
    observer: str = II("solver.observer")
    percentile: float = II("solver.percentile")
    smoothquant: bool = II("solver.smoothquant")
    smoothquant_alpha: float | None = II("solver.smoothquant_alpha")
    alpha_steps: int = II("solver.alpha_steps")
    search_loss: str = II("solver.search_loss")
    lm_head: bool = II("solver.lm_head")
    skip: list[str] = II("solver.skip")
    overrides: list[OverrideConfig] = II("solver.overrides")
    budget_bits: float | None = II("solver.budget_bits")
    budget_bytes: int | None = II("solver.budget_bytes")
    bit_choices: list[Any] = II("solver.bit_choices")
    sensitivity: str = II("solver.sensitivity")
    sensitivity_windows: int = II("solver.sensitivity_windows")


@dataclass
class VariantConfig:
    """One artifact: a solver and the container its numbers are written in."""

    solver: VariantSolverConfig = field(default_factory=VariantSolverConfig)
    container: str = II("container")
    dtype: str | None = None  # of tensors that are not quantized: float32 | bfloat16 | float16; null: as in the checkpoint
    grid: str | None = II("grid")  # gguf: the file type, such as q4_0 or q4_k_m; it decides every layer's bits and groups
    pure: bool = False  # gguf: the file type's own type for every matrix, and no mix
    token_embedding_type: str | None = None  # gguf: such as q8_0; null: as llama.cpp has it
    output_tensor_type: str | None = None
    gate: VariantGateConfig = field(default_factory=VariantGateConfig)


@dataclass
class EvalConfig:
    """``eval``: the protocol of perplexity, and what is measured beside it."""

    text: str = "builtin"  # builtin (its held-out part) | FILE
    windows: int = 16  # -1: all of the text; of protocol=wikitext: pages
    seq_len: int | None = None  # null: the protocol's own
    stride: int | None = None  # null: the protocol's own
    bos: bool = False  # protocol=windows and strided; the others decide for themselves
    protocol: str = "windows"  # windows | gptq | llamacpp | strided | wikitext
    divergence: bool = True  # from the unquantized variant, where the recipe has one
    top_k: int = 256  # of its likeliest tokens that are stored for it, one by one
    tasks: list[str] = field(default_factory=list)  # of lm-eval's, or builtin, whose accuracy is measured
    task_dir: str | None = None  # a folder of task YAML files besides lm-eval's
    task_limit: int | None = None  # items of each task; null: all


@dataclass
class PublishConfig:
    """``publish``: where the run's artifacts go when they are finished (docs/publish.md)."""

    registry: str | None = None  # local | hub | oci | mlflow; null: nowhere
    location: str | None = None  # local: a directory; oci: HOST[:PORT]; mlflow: URI; hub: none
    name: str | None = None  # a variant is published as NAME-VARIANT; null: the model's name; hub: OWNER/NAME
    tag: str = "latest"
    force: bool = False  # publish what failed its gate, and say so in the release
    sign_key: str | None = None  # file of a minisign secret key (its password: MINISIGN_PASSWORD); null: not signed


@dataclass
class RunConfig:
    """The whole recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)
    variants: dict[str, VariantConfig] = field(default_factory=dict)
    container: str = "gptq"  # of variants that name none
    grid: str | None = None
    quality: str = "balanced"
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    output_dir: str = MISSING
    device: str = "auto"
    seed: int = 0
    debug: bool = False
    log_level: str = "info"


def register_configs() -> None:
    """Make the schema known to Hydra under the name ``schema``."""
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
