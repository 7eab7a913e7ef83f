"""``python -m exports.pull REF DEST``: a release from a registry, every file checked, as a directory its consumer loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from exports.command import EXIT_CODES, REFERENCE, carry_out
from exports.registry.names import parse_reference
from exports.registry.transfer import pull


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit codes as in :mod:`exports.command`."""
    parser = argparse.ArgumentParser(prog="python -m exports.pull", description=__doc__.split(": ", 1)[1], epilog=EXIT_CODES)
    parser.add_argument("reference", metavar="REF", help=REFERENCE)
    parser.add_argument("destination", metavar="DEST", type=Path, help="a new directory; it appears whole or not at all")
    options = parser.parse_args(arguments)

    def action() -> int:
        release = pull(parse_reference(options.reference), options.destination)
        print(f"{options.destination}: {len(release.entries) + 1} files, {release.size:,} bytes, {release.digest}")
        return 0

    return carry_out(action)


if __name__ == "__main__":
    sys.exit(main())
