"""``python -m exports.inspect DIR|REF``: what is inside: tensors, types, bits, sizes, and where it comes from. Headers only."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from exports.command import EXIT_CODES, REFERENCE, Contents, carry_out, opened
from exports.tensors import Layer, StoredTensor, layers, stored_tensors
from quantize.artifact import EVALUATION, MANIFEST
from quantize.errors import InputError

_LINEAGE = ("name", "container", "solver", "grid", "quality", "bits", "bits_per_weight", "base", "calibration", "seed")


def inspect(contents: Contents) -> dict[str, Any]:
    """What an artifact or a release holds, as JSON values.

    ``tensors``: as stored; ``layers``: the weights they make up; ``kinds``: those summed up by how they are stored;
    ``lineage``: from the artifact's manifest, null without one; ``release``: what release.json says, null without one.

    Raises:
        InputError: a damaged header or JSON file, or no weights at all.
    """
    config = read_json_file(contents, "config.json") or {}
    tensors = stored_tensors(contents.files)
    if not tensors:
        raise InputError(f"{contents.title} has no safetensors and no GGUF file with tensors; name an artifact's directory")
    found = layers(tensors, contents.files, config)
    manifest = read_json_file(contents, MANIFEST)
    release = json.loads(contents.release) if contents.release else None
    if release:
        release = {"digest": contents.digest, **{key: value for key, value in release.items() if key != "files"}}
    files = {name: path.stat().st_size for name, path in sorted(contents.files.items())}
    weights, nbytes = sum(layer.weights for layer in found), sum(tensor.nbytes for tensor in tensors)
    return {
        "title": contents.title,
        "files": files,
        "weights": weights,
        "tensor_bytes": nbytes,
        "bits_per_weight": 8 * nbytes / weights if weights else None,
        "kinds": _kinds(found),
        "layers": [asdict(layer) for layer in found],
        "tensors": [_plain(tensor) for tensor in tensors],
        "lineage": {key: manifest.get(key) for key in (*_LINEAGE, "versions", "fingerprint")} if manifest else None,
        "figures": read_json_file(contents, EVALUATION),
        "release": release,
    }


def read_json_file(contents: Contents, name: str) -> dict[str, Any] | None:
    """One of the JSON files, an object; None where there is none.

    Raises:
        InputError: it is not JSON, or not an object.
    """
    if name not in contents.files:
        return None
    try:
        value = json.loads(contents.files[name].read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{contents.title}: {name} is not valid JSON; fetch it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{contents.title}: {name} holds no JSON object; fetch it again")
    return value


def _kinds(found: list[Layer]) -> list[dict[str, Any]]:
    groups: dict[str, list[Layer]] = {}
    for layer in found:
        groups.setdefault(layer.kind, []).append(layer)
    rows = []
    for kind, group in groups.items():
        weights, nbytes = sum(layer.weights for layer in group), sum(layer.nbytes for layer in group)
        row = {"kind": kind, "bits": group[0].bits, "layers": len(group), "weights": weights, "bytes": nbytes}
        rows.append((nbytes, {**row, "bits_per_weight": 8 * nbytes / weights if weights else None}))
    return [row for _, row in sorted(rows, key=lambda each: (-each[0], each[1]["kind"]))]


def _plain(tensor: StoredTensor) -> dict[str, Any]:
    return {**asdict(tensor), "shape": list(tensor.shape)}


def show(report: Mapping[str, Any], console: Console, every_tensor: bool) -> None:
    """Print the report as tables."""
    # Names come from files: as Text, nothing in them is taken for the terminal's markup or its control characters.
    console.print(_text(report["title"]), soft_wrap=True)
    table = _table("stored as", "layers", "weights", "bytes", "bits/weight")
    for row in report["kinds"]:
        per_weight = "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}"
        table.add_row(row["kind"], f"{row['layers']:,}", f"{row['weights']:,}", f"{row['bytes']:,}", per_weight)
    total = report["bits_per_weight"]
    cells = (f"{report['weights']:,}", f"{report['tensor_bytes']:,}", "" if total is None else f"{total:.2f}")
    table.add_row("all", f"{len(report['layers']):,}", *cells)
    console.print(table)
    if every_tensor:
        table = _table("tensor", "type", "shape", "bytes", "file", text=(0, 1, 2, 4))
        for each in report["tensors"]:
            shape = " x ".join(map(str, each["shape"])) or "1"
            table.add_row(_text(each["name"]), each["kind"], shape, f"{each['nbytes']:,}", _text(each["file"]))
        console.print(table)
    for title in ("lineage", "release"):
        if report[title]:
            console.print(f"\n{title}")
            for key, value in report[title].items():
                shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=True)
                console.print(_text(f"  {key}: {shown}"), soft_wrap=True)
    table = _table("file", "bytes")
    for name, size in report["files"].items():
        table.add_row(_text(name), f"{size:,}")
    console.print(table)


def _table(*columns: str, text: tuple[int, ...] = (0,)) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in text else "right", overflow="fold", no_wrap=index not in text)
    return table


def _text(value: str) -> Text:
    return Text("".join(letter if letter.isprintable() else "?" for letter in value))


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit codes as in :mod:`exports.command`."""
    parser = argparse.ArgumentParser(prog="python -m exports.inspect", description=__doc__.split(": ", 1)[1], epilog=EXIT_CODES)
    parser.add_argument("what", metavar="DIR|REF", help=f"a directory, or {REFERENCE}")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    options = parser.parse_args(arguments)

    def action() -> int:
        with opened(options.what) as contents:
            report = inspect(contents)
        if options.json:
            print(json.dumps(report, indent=2))
        else:
            show(report, Console(width=None if sys.stdout.isatty() else 120), options.tensors)
        return 0

    return carry_out(action)


if __name__ == "__main__":
    sys.exit(main())
