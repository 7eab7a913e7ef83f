"""``python -m exports.registry COMMAND LOCATION``: what is in a registry, whether it is whole, and what can go.

A location is ``local:DIR`` or, for short, ``DIR``; other registries as in a reference: ``SCHEME:LOCATION``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from exports.command import EXIT_CODES, REFERENCE, carry_out
from exports.registry import Registry, connect
from exports.registry.bench import bench
from exports.registry.local import LocalRegistry
from exports.registry.names import SCHEMES, check_name, parse_reference
from exports.registry.release import parse_release
from exports.registry.upkeep import GRACE, collect_garbage, registry_problems
from quantize.errors import InputError


def open_location(text: str) -> Registry:
    """The registry at ``SCHEME:LOCATION`` or in the directory ``text``.

    Raises:
        InputError: there is no registry.
    """
    scheme, colon, location = text.partition(":")
    registry = connect(scheme, location) if colon and scheme in SCHEMES else connect("local", text)
    if isinstance(registry, LocalRegistry) and not (registry.directory / "registry.json").is_file():
        raise InputError(f"{registry.directory} is no registry; name a directory that something was published to")
    return registry


def _local(text: str) -> LocalRegistry:
    registry = open_location(text)
    if not isinstance(registry, LocalRegistry):
        raise InputError(f"{text} looks after itself; this command is for local registries")
    return registry


def _list(options: argparse.Namespace) -> int:
    registry = open_location(options.location)
    found = {name: registry.tags(name) for name in registry.names()}
    _print(options, found, [f"{name}: {', '.join(sorted(tags)) or '(no tags)'}" for name, tags in found.items()])
    return 0


def _tags(options: argparse.Namespace) -> int:
    registry = open_location(options.location)
    name = check_name(options.name, registry.scheme)
    rows = []
    for tag, digest in sorted(registry.tags(name).items()):
        release = parse_release(registry.manifest(name, digest), f"{name}:{tag}")
        rows.append({"tag": tag, "digest": digest, "files": len(release.entries), "bytes": release.size})
    if not rows:
        raise InputError(f"{options.location} has no tags of {name}; `list` shows the names there are")
    _print(options, rows, [f"{row['tag']}\t{row['digest']}\t{row['files']} files\t{row['bytes']:,} bytes" for row in rows])
    return 0


def _verify(options: argparse.Namespace) -> int:
    problems = registry_problems(_local(options.location))
    _print(options, problems, problems or [f"{options.location}: unchanged"])
    return 3 if problems else 0


def _gc(options: argparse.Namespace) -> int:
    if options.grace < 0:
        raise InputError(f"--grace {options.grace:g} is negative; use 0 or more seconds")
    chosen = {"grace": options.grace, "delete_untagged": options.delete_untagged, "dry_run": options.dry_run}
    swept = collect_garbage(_local(options.location), **chosen)
    done = "would remove" if options.dry_run else "removed"
    _print(options, vars(swept), [f"{done} {swept.blobs} blobs, {swept.bytes:,} bytes, {swept.releases} releases"])
    return 0


def _untag(options: argparse.Namespace) -> int:
    reference = parse_reference(options.reference)
    if reference.digest is not None:
        raise InputError(f"{reference}: a tag is removed by its name alone; leave the digest out")
    _local(f"{reference.scheme}:{reference.location}").remove_tag(reference.name, reference.tag)
    print(f"{reference}: removed")
    return 0


def _bench(options: argparse.Namespace) -> int:
    result = bench(options.directory, options.rounds)
    ratio, sizes = result["ratio"], f"{result['files']} files, {result['bytes']:,} bytes"
    lines = [f"{sizes}, median of {options.rounds} rounds, each publishing and copying in turn"]
    lines += [f"{name:<42}{result[name]:8.3f} s" for name in ("cp -r and sha256sum", "publish", "publish, nothing changed")]
    lines.append(f"publish takes {ratio:.2f} times as long as cp -r and sha256sum")
    _print(options, result, lines)
    return 0


def _print(options: argparse.Namespace, value: Any, lines: list[str]) -> None:
    print(json.dumps(value, indent=2) if options.json else "\n".join(lines))


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit codes as in :mod:`exports.command`."""
    parser = argparse.ArgumentParser(prog="python -m exports.registry", description=__doc__.split("\n")[0], epilog=EXIT_CODES)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, action: Any, help_: str, location: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help_, description=help_, epilog=EXIT_CODES)
        made.set_defaults(action=action)
        made.add_argument("--json", action="store_true", help="print JSON")
        if location:
            made.add_argument("location", metavar="LOCATION", help="a directory, or SCHEME:LOCATION")
        return made

    command("list", _list, "the names in a registry and their tags")
    command("tags", _tags, "a name's tags: digest, files, bytes").add_argument("name", metavar="NAME")
    command("verify", _verify, "hash every file of every release, and name what is not as it should be")
    gc = command("gc", _gc, "remove files that no release needs")
    gc.add_argument("--grace", type=float, default=GRACE, help="seconds; younger files stay (default: a day)")
    gc.add_argument("--delete-untagged", action="store_true", help="also remove releases of which no tag speaks")
    gc.add_argument("--dry-run", action="store_true", help="only count")
    command("untag", _untag, "remove a tag; its release stays", location=False).add_argument(
        "reference", metavar="REF", help=REFERENCE
    )
    made = command("bench", _bench, "time publishing a directory against cp -r and sha256sum", location=False)
    made.add_argument("directory", metavar="DIR", type=Path, help="an artifact, or a folder of artifacts")
    made.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    return carry_out(lambda: int(options.action(options)))


if __name__ == "__main__":
    sys.exit(main())
