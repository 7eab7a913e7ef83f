"""The model card: ``README.md`` of a release, with the YAML header the Hugging Face Hub reads.

Everything in it comes from the artifact's manifest, its figures and the run's report; nothing is measured or guessed here. The
header's fields are those of the Hub's model cards (https://huggingface.co/docs/hub/model-cards); licences are given as SPDX
identifiers too (https://spdx.org/licenses).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from exports.card_commands import how_to_run

Json = Mapping[str, Any]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The Hub's identifiers of licences whose SPDX identifiers are not the same in other letters.
_SPDX = {
    **{each.lower(): each for each in ("Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Unlicense", "MPL-2.0")},
    **{each.lower(): each for each in ("CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "EUPL-1.2")},
    **{each.lower(): each for each in ("CC-BY-ND-4.0", "CC-BY-NC-ND-4.0", "WTFPL", "Zlib", "CC-BY-3.0", "CC-BY-SA-3.0")},
    "gpl-3.0": "GPL-3.0-only",
    "lgpl-3.0": "LGPL-3.0-only",
    "agpl-3.0": "AGPL-3.0-only",
    "gpl-2.0": "GPL-2.0-only",
}
_METHODS = {
    "gptq": "GPTQ (arXiv:2210.17323)",
    "awq": "AWQ (arXiv:2306.00978)",
    "awq+gptq": "AWQ's scales (arXiv:2306.00978) and GPTQ's rounding (arXiv:2210.17323)",
    "rtn": "round-to-nearest",
    "nf4": "NF4 by bitsandbytes (arXiv:2305.14314)",
    "llm_int8": "LLM.int8() by bitsandbytes (arXiv:2208.07339)",
}
_COLUMNS: tuple[tuple[str, str, Any], ...] = (
    ("variant", "name", str),
    ("bits/weight", "bits_per_weight", lambda value: f"{value:.2f}"),
    ("size (MB)", "size_bytes", lambda value: f"{value / 1e6:,.1f}"),
    ("compression", "compression", lambda value: f"{value:.2f}x"),
    ("perplexity", "ppl", lambda value: f"{value:,.2f}"),
    ("against unquantized", "ppl_ratio", lambda value: f"{100 * (value - 1):+.2f} %"),
    ("KL divergence", "kld_mean", lambda value: f"{value:.4f}"),
    ("same top token", "top1_agreement", lambda value: f"{100 * value:.1f} %"),
    ("accuracy (%)", "accuracy", str),
    ("peak RSS (MiB)", "peak_rss_bytes", lambda value: f"{value / 2**20:,.0f}"),
    ("decode (tokens/s)", "decode_tokens_per_second", lambda value: f"{value:,.1f}"),
    ("time to make (s)", "seconds", lambda value: f"{value:,.1f}"),
)


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    Attributes:
        name: the release's name, the card's title.
        manifest: the artifact's ``manifest.json``.
        files: names of the files in the release.
        evaluation: its ``evaluation.json``; None where nothing was measured.
        report: the run's ``report.json``, for the table of all variants; None without one.
        base_model: hub id of the model it was made from; None where that is not known.
        gate: the gate's result, with ``passed``; None where there were no limits.
        forced: whether it is published although its gate failed.
    """

    name: str
    manifest: Json
    files: Sequence[str]
    evaluation: Json | None = None
    report: Json | None = None
    base_model: str | None = None
    gate: Json | None = None
    forced: bool = False


def spdx(license_id: str | None) -> str:
    """The SPDX expression of a licence by its Hub identifier; ``LicenseRef-...`` without one, ``NOASSERTION`` for None."""
    if not license_id or license_id.lower() in ("unknown", "other"):
        return "NOASSERTION"
    known = _SPDX.get(license_id.lower())
    return known or "LicenseRef-" + re.sub(r"[^A-Za-z0-9.-]+", "-", license_id)


def render_card(facts: CardFacts) -> str:
    """The card as Markdown; the same facts make the same bytes."""
    manifest = facts.manifest
    header = f"---\n{_header(facts)}\n---\n\n<!-- SPDX-License-Identifier: {spdx(manifest['base'].get('license'))} -->"
    blocks = [header, f"# {_plain(facts.name)}", _what(facts)]
    if facts.forced:
        blocks.append(
            "> **It failed its quality gate** and is published because its publisher insisted (`publish.force=true`); see "
            "[gate.json](gate.json)."
        )
    blocks += ["## Memory, quality, speed", *_figures(facts)]
    blocks += ["## How to run it", *how_to_run(facts.name, str(manifest["container"]), facts.files, base_model(facts))]
    blocks += ["## How it was measured", *_protocol(facts), "## How it was made", _made(facts)]
    blocks += ["## Limits", _limits(facts), "## Files", _files(), "## Licence", _license(facts)]
    return "\n\n".join(blocks) + "\n"


def _header(facts: CardFacts) -> str:
    manifest, base = facts.manifest, base_model(facts)
    license_id = manifest["base"].get("license")
    gguf = manifest["container"] == "gguf"
    solver, bits = manifest["solver"]["name"], manifest["bits"]
    words = ["quantize", str(manifest["container"])]
    if solver != "none":
        words += [*([solver] if solver != manifest["container"] else []), f"{bits:g}-bit"]
    known = license_id is not None and (license_id.lower() in _SPDX or license_id.lower() in ("llama2", "gemma", "openrail"))
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base and solver != "none" else None,
        license=(license_id.lower() if known else "other") if license_id else None,
        license_name=license_id if license_id and not known else None,
        library_name="gguf" if gguf else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(words)),
    )
    return data.to_yaml().strip()


def base_model(facts: CardFacts) -> str | None:
    """The hub id of the model it was made from: as told, else the manifest's name where that is one."""
    name = str(facts.manifest["base"].get("name") or "").partition("@")[0]
    return facts.base_model or (name if _HUB_ID.fullmatch(name) else None)


def _what(facts: CardFacts) -> str:
    manifest, solver = facts.manifest, facts.manifest["solver"]["name"]
    base = base_model(facts)
    name = str(manifest["base"]["name"])
    link = f"[{base}](https://huggingface.co/{base})"
    # A local copy may have been changed; its name says at least that it was one.
    origin = link if name.partition("@")[0] == base else f"`{name}`" + (f", of {link}" if base else "")
    if solver == "none":
        return f"{origin}, not quantized, as {manifest['container']}."
    how = _METHODS.get(solver, solver)
    return (
        f"{origin}, quantized to {manifest['bits']:g} bits by {how}, as {manifest['container']}: "
        f"{manifest['bits_per_weight']:.2f} bits a weight with everything counted, {manifest['size_bytes'] / 1e6:,.1f} MB."
    )


def _figures(facts: CardFacts) -> list[str]:
    rows = [_row(row) for row in facts.report["variants"]] if facts.report else []
    own = str(facts.manifest["name"])
    if not rows and facts.evaluation:
        rows = [
            _row({**facts.evaluation, "name": own, **{key: facts.manifest[key] for key in ("bits_per_weight", "size_bytes")}})
        ]
    if not rows:
        return ["Nothing was measured on this artifact."]
    for row in rows:
        if row["name"] == own and facts.evaluation:
            row.update({key: value for key, value in _row(facts.evaluation).items() if row.get(key) is None})
    columns = [column for column in _COLUMNS if any(row.get(column[1]) is not None for row in rows)]
    lines = [
        " | ".join(title for title, _, _ in columns),
        " | ".join("---" if key == "name" else "---:" for _, key, _ in columns),
    ]
    for row in rows:
        cells = ["n/a" if row.get(key) is None else _plain(show(row[key])) for _, key, show in columns]
        if row["name"] == own:
            cells = [f"**{cell}**" for cell in cells]
        lines.append(" | ".join(cells))
    blocks = ["\n".join(f"| {line} |" for line in lines)]
    if facts.report:
        blocks[0] += "\n\nAll variants of the same run; this one in bold."
    if "report.png" in facts.files:
        blocks.append("![Artifact size against perplexity](report.png)")
    return blocks


def _row(record: Json) -> dict[str, Any]:
    """The figures of one variant, from a report's row or an artifact's evaluation, under this table's names."""
    row = dict(record)
    for group in ("divergence", "speed"):
        if isinstance(record.get(group), Mapping):
            row = {**record[group], **row}
    tasks = record.get("tasks") or {}
    row["accuracy"] = ", ".join(f"{name} {_share(found)}" for name, found in tasks.items()) or None
    return row


def _share(found: Json) -> str:
    """A task's score and its standard error, in per cent."""
    stderr = "" if found["stderr"] is None else f" ± {100 * found['stderr']:.1f}"
    return f"{100 * found['value']:.1f}{stderr}"


def _protocol(facts: CardFacts) -> list[str]:
    source = facts.evaluation or facts.report
    if source is None or not source.get("protocol"):
        return ["Nothing was measured."]
    told = {("protocol" if key == "name" else key): value for key, value in source["protocol"].items()}
    lines = [f"- {_plain(key)}: {_plain(_value(value))}" for key, value in told.items()]
    reference = (source.get("divergence") or {}).get("reference") if facts.evaluation else None
    if isinstance(reference, Mapping):
        kept = f", its {reference['top_k']} likeliest tokens and the rest as one" if reference.get("top_k") else ""
        name, fingerprint = _plain(str(reference.get("name"))), reference.get("artifact_fingerprint")
        lines.append(f"- divergence: from {name} (artifact `{fingerprint}`){kept}")
    if facts.evaluation and facts.evaluation.get("consumer"):
        lines.append(f"- loaded by: {_plain(str(facts.evaluation['consumer']))}")
    lines.append("- peak RSS: of the process that loads it, at its largest while loading")
    blocks = ["Each figure was measured on this artifact's files, as that program loaded them:", "\n".join(lines)]
    own = next((row for row in (facts.report or {}).get("variants", ()) if row["name"] == facts.manifest["name"]), None)
    if own and own.get("command"):
        # The folder a run wrote to is not the one a reader has.
        command = re.sub(r"(-m eval\.perplexity )(?:'[^']*'|\S+)", r"\1.", str(own["command"]))
        command = re.sub(r" --(?:save-reference|reference|top-k) (?:'[^']*'|\S+)", "", command)
        blocks += ["Again, in this directory, with the same text:", f"```sh\n{command}\n```"]
    return blocks


def _made(facts: CardFacts) -> str:
    manifest = facts.manifest
    lines = [f"- solver: {_plain(_value(manifest['solver']))}"]
    told = [key for key in ("grid", "quality", "calibration", "seed") if manifest.get(key) is not None]
    lines += [f"- {key}: {_plain(_value(manifest[key]))}" for key in told]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest["versions"].items()))
    lines += [
        f"- versions: {_plain(versions)}",
        f"- sha256 of the base model's weight files: `{manifest['base'].get('sha256')}`",
    ]
    lines.append("- the whole recipe: [recipe.yaml](recipe.yaml)" if "recipe.yaml" in facts.files else "- no recipe was kept")
    return "\n".join(lines)


def _limits(facts: CardFacts) -> str:
    lines = [
        "- It answers as the model it was made from does, its faults included, and a little less well: see the table.",
        "- The figures hold for the text, the program and the settings above; other languages, long contexts and tasks that "
        "are not named were not measured.",
        "- Quantization can change which answer is the likeliest even where the average hardly moves; try it on your own task.",
    ]
    if facts.evaluation is None or not facts.evaluation.get("tasks"):
        lines.append("- No task accuracy was measured.")
    if facts.evaluation is None or not facts.evaluation.get("speed"):
        lines.append("- No speed was measured.")
    return "\n".join(lines)


def _files() -> str:
    return (
        "`release.json` lists every file with its sha256, `SHA256SUMS` the same for `sha256sum --check SHA256SUMS`, and "
        "`manifest.json` what the artifact is and how it came about. No file is a pickle, and none runs code when it is loaded."
    )


def _license(facts: CardFacts) -> str:
    name = facts.manifest["base"].get("license")
    if not name:
        return "The checkpoint it was made from names no licence (SPDX: `NOASSERTION`); its terms hold for this artifact too."
    return f"That of the model it was made from: `{spdx(name)}` (SPDX)."


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(each)}" for key, each in value.items() if each is not None) or "none"
    return json.dumps(value, ensure_ascii=False)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line, in a table cell too."""
    return re.sub(r"([\\`*_\[\]<>|~$])", r"\\\1", " ".join(str(text).split()))
