"""GPTQ here and elsewhere, side by side: ``python -m eval.bench_gptq`` (``make bench-gptq``).

Every method gets the same calibration windows, runs in a process of its own on the CPU, and is judged by the perplexity of its
artifact as transformers loads it from disk. Finished rows are kept below ``--work-dir`` and reused under the same settings.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from eval.bench_methods import (
    GPTQ,
    Bench,
    Method,
    Row,
    Setting,
    evaluate,
    make_windows,
    missing,
    quantize,
    version_of,
)
from eval.bench_process import PROJECT, table_console
from eval.bench_table import notes, render_markdown, render_table
from quantize.demo_model import demo_model
from quantize.errors import InputError
from quantize.files import read_json, sha256_file, sha256_json, write_json, write_text
from quantize.keys import text_stamp
from quantize.logs import setup_logging
from quantize.manifest import cpu_name, versions

log = logging.getLogger("bench")
_SOURCES = ("quantize", "calibration", "exports", "recipes")
_KEPT = ("done", "stopped")


def sources_hash(method: Method) -> str:
    """Hash of the code that makes and measures a row, so that a changed solver is measured again."""
    folders = ("eval/peers",) if method.package != "quantize" else _SOURCES
    files = [file for folder in (*folders, "eval/consumers") for file in sorted((PROJECT / folder).rglob("*"))]
    files = [*(file for file in files if file.suffix in (".py", ".yaml")), PROJECT / "eval" / "perplexity.py"]
    return sha256_json([[str(file.relative_to(PROJECT)), sha256_file(file)] for file in files])


def row_key(method: Method, setting: Setting, model_fingerprint: str) -> str:
    """Everything a row's figures depend on."""
    text = [] if setting.text == "builtin" else text_stamp(setting.text)
    return sha256_json(
        [
            asdict(method),
            version_of(method, setting),
            model_fingerprint,
            sha256_file(setting.windows_file),
            setting.evaluation(),
            text,
            versions(),
            torch.get_num_threads(),
            sources_hash(method),
        ]
    )


def measure(method: Method, setting: Setting, key: str, fresh: bool) -> Row:
    """A method's row: the one kept from an earlier run under the same settings, or a new one, which is kept."""
    kept, directory = setting.work / "results" / f"{method.name}.json", setting.work / "runs" / method.name
    if not fresh and kept.exists():
        row: Row = read_json(kept)
        # What was stopped is worth another try only with more time.
        if row.get("key") == key and row["status"] in _KEPT and row.get("limit", setting.limit) >= setting.limit:
            log.info("%s: kept from an earlier run", method.name)
            return row
    kept.unlink(missing_ok=True)
    row = {"key": key, "name": method.name, "package": method.package, "version": version_of(method, setting)}
    row |= {"bits": method.bits, "group": method.group, "symmetric": method.symmetric}
    lacking = missing(method, setting)
    if lacking is not None:
        return {**row, "status": "missing", "outcome": lacking}
    begun = directory / "bench-key"
    # This project goes on where it was killed; the peers start over.
    resumes = method.package == "quantize" and begun.exists() and begun.read_text() == key
    if fresh or not resumes:
        shutil.rmtree(directory, ignore_errors=True)
        write_text(begun, key)
    log.info("%s ...", method.name)
    row |= quantize(method, setting)
    if row["status"] == "done":
        row |= evaluate(method, setting, Path(row.pop("artifact")))
    write_json(kept, row)
    log.info("%s: %s", method.name, row.get("outcome", "done"))
    return row


def protocol_of(setting: Setting, rows: list[Row], steps: dict[str, Any]) -> dict[str, Any]:
    """What the figures mean, in words, for the page."""
    calibrated = steps["calibrate"]["result"]
    samples, tokens = calibrated["windows"]
    source = "builtin" if setting.calibration is None else setting.calibration.name
    protocol: dict[str, Any] = {
        "model": f"{setting.model.name}, {steps['load']['result']['parameters']:,} parameters",
        "calibration": f"{samples} windows of {tokens} tokens of {source}, the same file for every method",
        "calibration windows sha256": calibrated["fingerprint"],
    }
    measured = next((row["protocol"] for row in rows if "protocol" in row), None)
    if measured is not None:
        protocol["perplexity"] = {**measured, "windows": setting.windows}
    if setting.text != "builtin":
        protocol["text sha256"] = sha256_file(Path(setting.text))
    protocol["seconds"] = (
        "wall time from loading the model to the saved artifact, without interpreter start and imports; "
        "ours: the manifest's steps load, calibrate, quantize and export"
    )
    protocol["peak RSS"] = "of the quantizing process, libraries included"
    protocol["artifact"] = "safetensors files"
    protocol["limit"] = f"{setting.limit:g} s a method, its evaluation apart"
    return protocol


def shown_command(arguments: list[str], bench: Bench = GPTQ) -> str:
    """The command line as another machine can repeat it: files by name, nothing of where this one keeps its folders."""
    shown: list[str] = []
    left = iter(arguments)
    for argument in left:
        option, _, value = argument.partition("=")
        if option in ("--llmcompressor-python", "--autoawq-python", "--work-dir", "--output"):
            if not value:
                next(left, None)
        elif option == "--fresh":
            continue
        elif value and Path(value).is_absolute():
            shown.append(f"{option}={Path(value).name}")
        else:
            shown.append(Path(argument).name if Path(argument).is_absolute() else argument)
    return shlex.join(["python", "-m", bench.module, *shown])


def parse(arguments: list[str], bench: Bench = GPTQ) -> tuple[Setting, list[Method], argparse.Namespace]:
    """Read the command line.

    Raises:
        InputError: a file is missing or a method unknown.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {bench.module}", description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint directory; default: the demo model")
    parser.add_argument("--calibration", type=Path, help="text file; default: builtin")
    parser.add_argument("--text", default="builtin", help="evaluation text file, or builtin (its held-out part)")
    parser.add_argument("--num-samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a calibration window")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows")
    parser.add_argument("--window-tokens", type=int, default=1024, help="tokens in an evaluation window")
    parser.add_argument("--only", help=f"methods, comma-separated: {', '.join(method.name for method in bench.methods)}")
    parser.add_argument("--limit", type=float, default=2400, help="seconds a method may take")
    work, page = Path(f"artifacts/bench-{bench.name}"), Path(f"docs/{bench.name}-bench.md")
    parser.add_argument("--work-dir", type=Path, default=work, help="artifacts, logs, finished rows")
    parser.add_argument("--output", type=Path, default=page, help="the table as Markdown")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    parser.add_argument("--llmcompressor-python", type=Path, default=Path(".venv-llmcompressor/bin/python"))
    parser.add_argument("--autoawq-python", type=Path, default=Path(".venv-autoawq/bin/python"))
    options = parser.parse_args(arguments)
    for file in (options.calibration, None if options.text == "builtin" else Path(options.text)):
        if file is not None and not file.is_file():
            raise InputError(f"{file} does not exist; give a text file, or leave it out for the builtin text")
    if options.model is not None and not (options.model / "config.json").exists():
        raise InputError(f"--model {options.model} is no checkpoint directory: it has no config.json")
    known = {method.name: method for method in bench.methods}
    wanted = options.only.split(",") if options.only else [method.name for method in bench.methods if not method.extra]
    for name in wanted:
        if name not in known:
            raise InputError(f"--only {name} is unknown; use some of {', '.join(known)}")
    setting = Setting(
        model=(options.model or demo_model()).absolute(),
        calibration=options.calibration.absolute() if options.calibration else None,
        text=options.text if options.text == "builtin" else str(Path(options.text).absolute()),
        num_samples=options.num_samples,
        seq_len=options.seq_len,
        windows=options.windows,
        window_tokens=options.window_tokens,
        limit=options.limit,
        work=options.work_dir.absolute(),
        llmcompressor_python=options.llmcompressor_python,
        autoawq_python=options.autoawq_python,
    )
    return setting, [known[name] for name in wanted], options


def run(arguments: list[str], bench: Bench = GPTQ) -> int:
    """Measure all rows, print and write the table; 1 when a row failed.

    Raises:
        InputError: bad input.
    """
    setting, methods, options = parse(arguments, bench)
    steps = make_windows(setting)
    fingerprint = steps["load"]["result"]["fingerprint"]
    rows = [measure(method, setting, row_key(method, setting, fingerprint), options.fresh) for method in methods]
    console = table_console()
    console.print(render_table(rows))
    for name, note in notes(rows).items():
        console.print(f"{name}: {note}", soft_wrap=True, markup=False, highlight=False)
    page = render_markdown(
        rows,
        title=bench.title,
        command=shown_command(arguments, bench),
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        protocol=protocol_of(setting, rows, steps),
        environment={"cpu": cpu_name(), "threads": torch.get_num_threads(), **versions()},
    )
    write_text(options.output, page)
    console.print(f"written: {options.output}", soft_wrap=True, markup=False)
    return 1 if any(row["status"] == "failed" for row in rows) else 0


def main(arguments: list[str] | None = None, bench: Bench = GPTQ) -> int:
    """Command line; exit code 0 done, 1 a row failed, 2 bad input."""
    setup_logging("info")
    try:
        return run(sys.argv[1:] if arguments is None else arguments, bench)
    except InputError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        log.error("interrupted; the same command goes on where this one stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main())
