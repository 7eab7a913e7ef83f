"""``python -m exports.diff A B``: what two artifacts or releases differ in: files, tensors, config keys, lineage, figures."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from exports.command import EXIT_CODES, REFERENCE, Contents, carry_out, opened
from exports.inspect import read_json_file
from exports.tensors import StoredTensor, stored_tensors
from quantize.artifact import EVALUATION, MANIFEST, RELEASE

_CHUNK = 2**20
_TABLES = {"config": "config.json", "lineage": MANIFEST, "figures": EVALUATION}


def diff(a: Contents, b: Contents) -> dict[str, Any]:
    """The differences, as JSON values: for ``files`` and ``tensors`` the names ``added``, ``removed`` and ``changed``; for
    ``config``, ``lineage`` and ``figures`` each dotted key with both values, null where one has none.

    Tensors are compared by type, shape and bytes, wherever in the files they lie. ``release.json`` follows from the rest and is
    left out.

    Raises:
        InputError: a damaged file.
    """
    hashes = [{name: _sha256(path) for name, path in side.files.items() if name != RELEASE} for side in (a, b)]
    same = {path for name, path in a.files.items() if name != RELEASE and hashes[0][name] == hashes[1].get(name)}
    sides = [{(t.name): t for t in stored_tensors(side.files)} for side in (a, b)]
    result: dict[str, Any] = {"files": _names(*hashes)}
    tensors = [
        {name: _identity(tensor, side.files[tensor.file], a.files.get(tensor.file) in same) for name, tensor in found.items()}
        for side, found in zip((a, b), sides, strict=True)
    ]
    result["tensors"] = _names(*tensors)
    for title, file in _TABLES.items():
        one, other = (dict(_flat(read_json_file(side, file) or {})) for side in (a, b))
        if title == "lineage":  # the hashes are told by files
            one, other = ({key: value for key, value in each.items() if not key.startswith("files.")} for each in (one, other))
        keys = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
        result[title] = {key: {"a": one.get(key), "b": other.get(key)} for key in keys}
    return result


def _names(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[str]]:
    return {
        "added": sorted(b.keys() - a.keys()),
        "removed": sorted(a.keys() - b.keys()),
        "changed": sorted(name for name in a.keys() & b.keys() if a[name] != b[name]),
    }


def _identity(tensor: StoredTensor, path: Path, unchanged: bool) -> tuple[Any, ...]:
    """What makes a tensor the same; of files that are the same as a whole, its place is enough and nothing is read."""
    if unchanged:
        return tensor.kind, tensor.shape, tensor.file, tensor.offset
    digest, left = hashlib.sha256(), tensor.nbytes
    with path.open("rb") as stream:
        stream.seek(tensor.offset)
        while left and (chunk := stream.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
    return tensor.kind, tensor.shape, digest.hexdigest()


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _flat(each, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, value


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def differs(result: Mapping[str, Any]) -> bool:
    """Whether anything differs."""
    return any(any(value.values()) if key in ("files", "tensors") else bool(value) for key, value in result.items())


def show(result: Mapping[str, Any], a: str, b: str) -> Iterator[str]:
    """The result as lines of text."""
    yield f"--- {a}"
    yield f"+++ {b}"
    for key in ("files", "tensors"):
        for mark, how in (("-", "removed"), ("+", "added"), ("~", "changed")):
            yield from (f"{mark} {key[:-1]} {_printable(name)}" for name in result[key][how])
    for title in _TABLES:
        for key, values in result[title].items():
            one, other = (json.dumps(values[side]) for side in "ab")
            yield f"~ {title} {_printable(key)}: {one} -> {other}"
    if not differs(result):
        yield "no difference"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit codes as in :mod:`exports.command`."""
    parser = argparse.ArgumentParser(prog="python -m exports.diff", description=__doc__.split(": ", 1)[1], epilog=EXIT_CODES)
    parser.add_argument("a", metavar="A", help=f"a directory, or {REFERENCE}")
    parser.add_argument("b", metavar="B", help="what it is compared with")
    parser.add_argument("--json", action="store_true", help="print the differences as one JSON object")
    options = parser.parse_args(arguments)

    def action() -> int:
        with opened(options.a) as a, opened(options.b) as b:
            result = diff(a, b)
            print(json.dumps(result, indent=2) if options.json else "\n".join(show(result, a.title, b.title)))
        return 3 if differs(result) else 0

    return carry_out(action)


if __name__ == "__main__":
    sys.exit(main())
