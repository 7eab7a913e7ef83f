"""``python -m exports.verify DIR|REF``: whether every file is the one that was published or exported; those that are not.

A pulled release is held against its ``release.json``, an artifact that was never published against its ``manifest.json``, a
release in a registry against the digest it goes by. Links, unlisted files, names that lead elsewhere and pickles are refused.
With ``--public-key``, so is a release that is not signed with that key.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from exports import minisign
from exports.command import EXIT_CODES, REFERENCE, carry_out
from exports.registry.names import is_reference, parse_reference
from exports.registry.transfer import directory_problems, reference_problems
from exports.signing import directory_signature_problems, reference_signature_problems
from quantize.artifact import MANIFEST, RELEASE, problems
from quantize.errors import InputError


def verify(what: str, key: minisign.PublicKey | None = None) -> list[str]:
    """Everything that is wrong with a directory or a release; empty: nothing. ``key``: with which it must be signed.

    Raises:
        InputError: there is no such thing, or a directory that is neither a release's nor an artifact's.
    """
    if is_reference(what):
        with tempfile.TemporaryDirectory() as scratch:
            reference = parse_reference(what)
            found = reference_problems(reference, Path(scratch))
            return found or (reference_signature_problems(reference, key) if key else [])
    directory = Path(what)
    if (directory / RELEASE).exists():
        return directory_problems(directory) or (directory_signature_problems(directory, key) if key else [])
    if key is not None:
        raise InputError(f"{directory} has no {RELEASE}: only releases are signed; name a pulled release, or leave out the key")
    if not (directory / MANIFEST).exists():
        raise InputError(f"{directory} has neither {RELEASE} nor {MANIFEST}; name a pulled release or an artifact's directory")
    return problems(directory)


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit codes as in :mod:`exports.command`."""
    parser = argparse.ArgumentParser(prog="python -m exports.verify", description=__doc__.split("\n")[0], epilog=EXIT_CODES)
    parser.add_argument("what", metavar="DIR|REF", nargs="+", help=f"a directory, or {REFERENCE}")
    parser.add_argument("--json", action="store_true", help="print a JSON object: what was asked for, and its problems")
    parser.add_argument("--public-key", metavar="KEY", help="minisign's: its file, or the line that starts with RW")
    options = parser.parse_args(arguments)

    def action() -> int:
        key = minisign.read_public_key(options.public_key) if options.public_key else None
        found = {what: verify(what, key) for what in options.what}
        if options.json:
            print(json.dumps(found, indent=2))
        else:
            signed = f", signed with {key.name}" if key else ""
            for what, wrong in found.items():
                print("\n".join(f"{what}: {problem}" for problem in wrong) or f"{what}: unchanged{signed}")
        return 3 if any(found.values()) else 0

    return carry_out(action)


if __name__ == "__main__":
    sys.exit(main())
