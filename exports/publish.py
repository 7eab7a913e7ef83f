"""``python -m exports.publish ARTIFACT REF``: an artifact, with its card, recipe and report, into a registry.

The ``publish`` stage of ``python -m quantize`` does the same for every variant of a run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from exports.command import EXIT_CODES, REFERENCE, carry_out
from exports.registry import connect
from exports.registry.names import parse_reference
from exports.registry.transfer import publish
from exports.releasing import build_release
from exports.sign import secret_key
from exports.signing import sign_release
from quantize.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit codes as in :mod:`exports.command`."""
    parser = argparse.ArgumentParser(prog="python -m exports.publish", description=__doc__.split(": ", 1)[1], epilog=EXIT_CODES)
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path, help="its directory, such as artifacts/demo/variants/NAME")
    parser.add_argument("reference", metavar="REF", help=REFERENCE.replace("[@sha256:HEX]", ""))
    parser.add_argument("--run", type=Path, help="the run's directory, whose recipe.yaml and report.* are published too")
    parser.add_argument("--checkpoint", type=Path, help="the model it was made from, whose licence texts are published too")
    parser.add_argument("--gate", type=Path, help="the gate's result (JSON with `passed`); one that failed is not published")
    parser.add_argument("--force", action="store_true", help="publish it although its gate failed; the release says so")
    parser.add_argument("--key", type=Path, metavar="FILE", help="sign with this minisign secret key (MINISIGN_PASSWORD)")
    options = parser.parse_args(arguments)

    def action() -> int:
        reference = parse_reference(options.reference)
        if reference.digest is not None:
            raise InputError(f"{reference}: the digest follows from what is published; leave it out")
        for name in ("run", "checkpoint"):
            folder = getattr(options, name)
            if folder is not None and not folder.is_dir():
                raise InputError(f"--{name} {folder} is not a directory")
        key = secret_key(options.key) if options.key else None
        release = build_release(
            options.artifact,
            reference.name.rpartition("/")[2],
            run=options.run,
            checkpoint=options.checkpoint,
            gate=_gate(options.gate),
            force=options.force,
        )
        if key is not None:
            release = sign_release(release, key)
        registry = connect(reference.scheme, reference.location)
        published, sent = publish(registry, reference.name, reference.tag, release)
        print(f"{published}\n{len(release.entries) + 1} files, {release.size:,} bytes, of which {sent:,} were new")
        return 0

    return carry_out(action)


def _gate(path: Path | None) -> dict[str, object] | None:
    if path is None:
        return None
    try:
        result = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"--gate {path} is no readable JSON file; give the gate's result") from error
    if not isinstance(result, dict) or not isinstance(result.get("passed"), bool):
        raise InputError(f"--gate {path} does not say `passed`: true or false; give the gate's result")
    return result


if __name__ == "__main__":
    sys.exit(main())
