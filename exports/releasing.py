"""A run's variant as a release: card, recipe, report and gate beside the artifact's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from exports.card import CardFacts, base_model, render_card, spdx
from exports.provenance import PROVENANCE, provenance
from exports.registry.base import GateFailed
from exports.registry.release import CARD, Release, assemble
from exports.registry.secrets import redact, redact_values
from quantize.artifact import read_evaluation, read_manifest
from quantize.errors import InputError

RECIPE = "recipe.yaml"
GATE = "gate.json"
_REPORTS = ("report.json", "report.md", "report.html", "report.png")
# Of the recipe: where a run lived, what it did and where it was published decide nothing about the artifact.
_LEFT_OUT = ("output_dir", "stages", "debug", "log_level", "publish")
_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
_IDENTITY = ("fingerprint", "container", "grid", "bits", "bits_per_weight", "size_bytes")


def build_release(
    artifact: Path,
    name: str,
    *,
    run: Path | None = None,
    checkpoint: Path | None = None,
    gate: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Release:
    """Assemble the release of an artifact.

    Args:
        artifact: its directory.
        name: the release's name, which is the card's title.
        run: the run's directory, with recipe.yaml and report.*; None: neither is published.
        checkpoint: the directory of the model it was made from, whose licence texts are carried over; None: none are.
        gate: the gate's result, a JSON object with ``passed``; None where there were no limits.
        force: publish it although the gate failed; the release then says so.

    Raises:
        GateFailed: the gate failed, and ``force`` is false.
        InputError: files are missing or damaged, or hold a secret.
    """
    failed = gate is not None and gate.get("passed") is not True
    if failed and not force:
        raise GateFailed(f"{artifact} failed its gate and is not published; mend it, or say publish.force=true")
    manifest = read_manifest(artifact)
    extras = {**_run_files(run), **_license_files(checkpoint)}
    extras[PROVENANCE] = ("provenance", provenance(manifest))
    if gate is not None:
        extras[GATE] = ("gate", _json(redact_values(dict(gate))))
    facts = CardFacts(
        name=name,
        manifest=manifest,
        files=[*manifest["files"], *extras],
        evaluation=read_evaluation(artifact),
        report=json.loads(extras["report.json"][1]) if "report.json" in extras else None,
        base_model=stated_base(checkpoint),
        gate=gate,
        forced=failed,
    )
    extras[CARD] = ("card", redact(render_card(facts)).encode())
    about = {
        "name": name,
        "artifact": {"solver": manifest["solver"]["name"], **{key: manifest.get(key) for key in _IDENTITY}},
        "base": {**manifest["base"], "model": base_model(facts)},
        "license": spdx(manifest["base"].get("license")),
        "gate": None if gate is None else {"passed": not failed},
        "forced": failed,
    }
    return assemble(artifact, extras, about)


def _run_files(run: Path | None) -> dict[str, tuple[str, bytes]]:
    found: dict[str, tuple[str, bytes]] = {}
    if run is None:
        return found
    if (run / RECIPE).is_file():
        found[RECIPE] = ("recipe", _recipe(run / RECIPE))
    for name in _REPORTS:
        if (run / name).is_file():
            data = (run / name).read_bytes()
            found[name] = ("report", data if name.endswith(".png") else _told(data.decode("utf-8")).encode())
    return found


def _recipe(path: Path) -> bytes:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML; run the recipe again") from error
    kept = {key: value for key, value in recipe.items() if key not in _LEFT_OUT}
    return _told(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)).encode()


def _told(text: str) -> str:
    """Text as a stranger may read it: no secrets, and no name of the publisher's home directory."""
    home = str(Path.home())
    return redact(text.replace(f"{home}/", "~/") if home not in ("", "/") else text)


def _license_files(checkpoint: Path | None) -> dict[str, tuple[str, bytes]]:
    if checkpoint is None or not checkpoint.is_dir():
        return {}
    return {name: ("license", (checkpoint / name).read_bytes()) for name in _LICENSES if (checkpoint / name).is_file()}


def stated_base(checkpoint: Path | None) -> str | None:
    """The hub id that a checkpoint's own card names as its base model; None where it names none."""
    if checkpoint is None or not (checkpoint / CARD).is_file():
        return None
    parts = (checkpoint / CARD).read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        header = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return None
    stated = header.get("base_model") if isinstance(header, dict) else None
    return stated if isinstance(stated, str) else None


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
