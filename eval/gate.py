"""The gate: may this artifact be released? A finished artifact's figures against limits, by exit code.

    python -m eval.gate ARTIFACT --limits kld_mean=0.05 size_bytes=100000000
    python -m eval.gate ARTIFACT --baseline FP16_ARTIFACT --limits limits.yaml kld_mean=0.05 --junit gate.xml --markdown gate.md

The artifact's files are hashed first, so a changed, missing or additional one fails the gate, and so do figures of other bytes.
Nothing is measured here. docs/gate.md has the limits. Exit codes: 0 passed, 3 failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from eval.figures import read_subject
from eval.gate_checks import judge
from eval.gate_output import as_json, render_junit, render_markdown, render_table, sentence
from quantize.atomic import atomic_path
from quantize.errors import InputError
from quantize.limits import presets, read_limits

GATE_FAILED = 3


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 0 passed, 3 failed, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        limits = read_limits(options.limits)
        baseline = read_subject(options.baseline) if options.baseline else None
        verdict = judge(read_subject(options.artifact), limits, baseline)
        outputs = {
            options.json: json.dumps(as_json([verdict]), indent=2, allow_nan=False) + "\n",
            options.junit: render_junit([verdict]),
            options.markdown: render_markdown([verdict]),
        }
        for path, text in outputs.items():
            if path is not None:
                with atomic_path(path) as temporary:
                    temporary.write_text(text, encoding="utf-8")
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    # Piped output has no width of its own.
    Console(width=None if sys.stdout.isatty() else 160).print(render_table(verdict))
    print(sentence(verdict), file=sys.stderr)
    return 0 if verdict.passed else GATE_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.gate", description="Hold a finished artifact against limits.")
    parser.add_argument("artifact", type=Path, help="artifact directory")
    parser.add_argument("--baseline", type=Path, help="artifact directory that ratios and scores are compared with")
    known = ", ".join(presets())
    parser.add_argument(
        "--limits",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME|FILE.yaml|key=value",
        help=f"presets ({known}), files and single limits, later over earlier",
    )
    parser.add_argument("--junit", type=Path, help="write JUnit XML to this file")
    parser.add_argument("--markdown", type=Path, help="write Markdown for a pull request to this file")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
