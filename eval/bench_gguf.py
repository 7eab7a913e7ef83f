"""GGUF files side by side, as llama.cpp runs them: ``python -m eval.bench_gguf`` (``make bench-gguf``).

Every file is made from the same F16 file or checkpoint and judged by llama.cpp's own programs: perplexity, divergence from the
F16 file token by token, tokens a second. Finished rows are kept below ``--work-dir`` and reused under the same settings.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from calibration.sources import load_text
from eval import llamacpp_tools
from eval.bench_gguf_methods import IMATRICES, METHODS, Method, Row, Setting, figures, make, make_base, missing, run_directory
from eval.bench_gguf_table import notes, render_markdown, render_table
from eval.bench_gptq import shown_command
from eval.bench_methods import Bench
from eval.bench_process import PROJECT, table_console
from eval.consumers import llamacpp
from quantize.checkpoint import open_checkpoint
from quantize.demo_model import demo_model
from quantize.errors import InputError
from quantize.files import read_json, sha256_file, sha256_json, write_json, write_text
from quantize.logs import quiet_libraries, setup_logging
from quantize.manifest import cpu_name, versions

log = logging.getLogger("bench")
_BENCH = Bench("gguf", ())
_SOURCES = ("quantize", "calibration", "exports", "recipes")
_MEASURED_BY = ("eval/bench_gguf_methods.py", "eval/llamacpp_tools.py", "eval/consumers/llamacpp.py")


def sources_hash(method: Method) -> str:
    """Hash of the code that makes and measures a row, so that a changed solver is measured again."""
    ours = method.recipe is not None or method.imatrix == "ours"
    files = [file for folder in _SOURCES if ours for file in sorted((PROJECT / folder).rglob("*"))]
    files = [file for file in files if file.suffix in (".py", ".yaml")] + [PROJECT / name for name in _MEASURED_BY]
    return sha256_json([[str(file.relative_to(PROJECT)), sha256_file(file)] for file in files])


def row_key(method: Method, setting: Setting, base: str) -> str:
    """Everything a row's figures depend on; ``base`` is the hash of the unquantized file."""
    texts = [sha256_file(setting.text), sha256_file(setting.calibration_text)]
    sizes = [setting.num_samples, setting.seq_len, setting.chunks, setting.context]
    tools = [llamacpp_tools.VERSION, str(llamacpp_tools.directory())]
    machine = [cpu_name(), torch.get_num_threads(), versions()]
    return sha256_json([asdict(method), base, texts, sizes, tools, machine, sources_hash(method)])


def measure(method: Method, setting: Setting, key: str, fresh: bool) -> Row:
    """A method's row: the one kept from an earlier run under the same settings, or a new one, which is kept when it is done."""
    kept = setting.work / "results" / f"{method.name}.json"
    if not fresh and kept.exists():
        row: Row = read_json(kept)
        if row.get("key") == key:
            log.info("%s: kept from an earlier run", method.name)
            return row
    kept.unlink(missing_ok=True)
    row = {"key": key, **asdict(method)}
    lacking = missing(method)
    if lacking is not None:
        return {**row, "status": "missing", "outcome": lacking}
    begun = run_directory(method, setting) / "bench-key"
    # This project goes on where it was killed; llama.cpp's programs start over.
    if fresh or not begun.exists() or begun.read_text() != key:
        shutil.rmtree(begun.parent, ignore_errors=True)
        write_text(begun, key)
    log.info("%s ...", method.name)
    try:
        file, seconds = make(method, setting)
        row |= {"status": "done", "seconds": seconds, **figures(method, setting, file)}
    except InputError as error:
        log.error("%s: %s", method.name, error)
        return {**row, "status": "failed", "outcome": "failed", "last": str(error)}
    write_json(kept, row)
    return row


def prepare(setting: Setting, fresh: bool) -> str:
    """Make what all rows need: the texts, the F16 file and its predictions; returns the F16 file's hash.

    Raises:
        InputError: llama.cpp is not built, the checkpoint cannot be converted, or the text is too short.
    """
    for name in ("llama-quantize", "llama-perplexity", "llama-imatrix", "llama-bench"):
        llamacpp_tools.tool(name)
    if fresh:
        for maker in IMATRICES:
            setting.imatrix_record(maker).unlink(missing_ok=True)
    source, path = ("builtin", None) if setting.calibration is None else ("text", str(setting.calibration))
    write_text(setting.calibration_text, load_text(source, "train", path=path).text)
    checkpoint = open_checkpoint(str(setting.model))
    sources = [sha256_file(file) for file in sorted((PROJECT / "exports").glob("*.py"))]
    key = sha256_json([[sha256_file(file) for file in checkpoint.fingerprint_files()], sources])
    if _stale(setting.base, key, fresh):
        log.info("%s ...", setting.base.name)
        make_base(setting)
        write_text(_key_file(setting.base), key)
    base = sha256_file(setting.base)
    key = sha256_json([base, sha256_file(setting.text), setting.context, setting.chunks, llamacpp_tools.VERSION])
    if _stale(setting.base_logits, key, fresh):
        log.info("%s ...", setting.base_logits.name)
        found = llamacpp.save_logits(
            setting.base,
            setting.text,
            setting.base_logits,
            context=setting.context,
            chunks=setting.chunks,
            limit=setting.limit,
        )
        write_json(setting.base_figures, {"ppl": found.ppl, "ppl_error": found.error, "tokens": found.tokens})
        write_text(_key_file(setting.base_logits), key)
    return base


def _key_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.key")


def _stale(file: Path, key: str, fresh: bool) -> bool:
    """Whether ``file`` was not made under ``key``; then its key is taken away first."""
    written = _key_file(file)
    if not fresh and file.exists() and written.exists() and written.read_text() == key:
        return False
    written.unlink(missing_ok=True)
    return True


def protocol_of(setting: Setting, text: str, rows: Sequence[Row]) -> dict[str, Any]:
    """What the figures mean, in words, for the page."""
    source = "builtin" if setting.calibration is None else setting.calibration.name
    tokens = next((row["tokens"] for row in rows if "tokens" in row), 0)
    return {
        "model": setting.model.name,
        "calibration": f"{setting.num_samples} windows of {setting.seq_len} tokens of {source}; llama-imatrix takes the first, "
        "this project a seeded choice",
        "ppl": f"llama-perplexity -c {setting.context} --chunks {setting.chunks} on {text}: {tokens:,} tokens scored, the "
        "second half of each window",
        "text sha256": sha256_file(setting.text),
        "KLD, same top": "llama-perplexity --kl-divergence against the F16 file's predictions on the same tokens",
        "bits/weight": "of the tensors, without metadata and vocabulary",
        "seconds": "wall time to make the file from the F16 file, its importance matrix included; ours: the manifest's steps "
        "from load to export",
        "tokens/s": "llama-bench, generating 32 tokens one at a time, mean of 3",
        "limit": f"{setting.limit:g} s for a program",
    }


def parse(arguments: Sequence[str]) -> tuple[Setting, list[Method], argparse.Namespace]:
    """Read the command line.

    Raises:
        InputError: a file is missing or a method unknown.
    """
    parser = argparse.ArgumentParser(prog="python -m eval.bench_gguf", description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint directory; default: the demo model")
    parser.add_argument("--calibration", type=Path, help="text file; default: builtin")
    parser.add_argument("--text", default="builtin", help="evaluation text file, or builtin (its held-out part)")
    parser.add_argument("--num-samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a calibration window")
    parser.add_argument("--chunks", type=int, default=8, help="evaluation windows")
    parser.add_argument("--context", type=int, default=1024, help="tokens in an evaluation window")
    parser.add_argument("--only", help=f"methods, comma-separated: {', '.join(method.name for method in METHODS)}")
    parser.add_argument("--limit", type=float, default=2400, help="seconds a program may take")
    parser.add_argument("--work-dir", type=Path, default=Path("artifacts/bench-gguf"), help="files, logs, finished rows")
    parser.add_argument("--output", type=Path, default=Path("docs/gguf-bench.md"), help="the table as Markdown")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    options = parser.parse_args(arguments)
    for file in (options.calibration, None if options.text == "builtin" else Path(options.text)):
        if file is not None and not file.is_file():
            raise InputError(f"{file} does not exist; give a text file, or leave it out for the builtin text")
    if options.model is not None and not (options.model / "config.json").exists():
        raise InputError(f"--model {options.model} is no checkpoint directory: it has no config.json")
    known = {method.name: method for method in METHODS}
    wanted = options.only.split(",") if options.only else [method.name for method in METHODS if not method.extra]
    for name in wanted:
        if name not in known:
            raise InputError(f"--only {name} is unknown; use some of {', '.join(known)}")
    setting = Setting(
        model=(options.model or demo_model()).absolute(),
        calibration=options.calibration.absolute() if options.calibration else None,
        text=options.work_dir.absolute() / "text.txt",
        num_samples=options.num_samples,
        seq_len=options.seq_len,
        chunks=options.chunks,
        context=options.context,
        limit=options.limit,
        work=options.work_dir.absolute(),
    )
    return setting, [known[name] for name in wanted], options


def evaluation_text(text: str, calibration: Path | None) -> str:
    """The text that is evaluated on: all of a file, but only the held-out part of what is calibrated on as well.

    Raises:
        InputError: the file is not UTF-8.
    """
    if text == "builtin":
        return load_text("builtin", "heldout").text
    if calibration is not None and calibration.samefile(text):
        return load_text("text", "heldout", path=text).text
    try:
        return Path(text).read_bytes().decode("utf-8")  # line ends as they are: llama-perplexity reads them so
    except UnicodeDecodeError as error:
        raise InputError(f"--text {text} is not UTF-8 ({error.reason}); convert it, or use builtin") from error


def run(arguments: Sequence[str]) -> int:
    """Measure all rows, print and write the table; 1 when a row failed.

    Raises:
        InputError: bad input, or llama.cpp is not built.
    """
    setting, methods, options = parse(arguments)
    write_text(setting.text, evaluation_text(options.text, setting.calibration))
    base = prepare(setting, options.fresh)
    rows = [measure(method, setting, row_key(method, setting, base), options.fresh) for method in methods]
    console = table_console()
    console.print(render_table(rows))
    for name, note in notes(rows).items():
        console.print(f"{name}: {note}", soft_wrap=True, markup=False, highlight=False)
    page = render_markdown(
        rows,
        command=shown_command(list(arguments), _BENCH),
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        protocol=protocol_of(setting, Path(options.text).name, rows),
        environment={"cpu": cpu_name(), "llama.cpp": f"of {llamacpp_tools.PACKAGE} {llamacpp_tools.VERSION}", **versions()},
    )
    write_text(options.output, page)
    console.print(f"written: {options.output}", soft_wrap=True, markup=False)
    return 1 if any(row["status"] == "failed" for row in rows) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 0 done, 1 a row failed, 2 bad input."""
    setup_logging("info")
    quiet_libraries()
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except InputError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        log.error("interrupted; the same command goes on where this one stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main())
