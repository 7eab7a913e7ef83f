"""Our perplexities beside those of the programs that the protocols are named after, on the same weights and text.

    python -m eval.agreement MODEL --text wiki.test.raw --windows 16 --pages 4

``llama-perplexity`` runs a file of the same weights in F16 (``make llamacpp`` builds it), lm-eval the model in float32 (the
``eval`` extra). Each row gives both figures and by how much ours differs; nothing is printed that was not just measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.consumers import llamacpp, transformers_model
from eval.perplexity import evaluate_artifact
from eval.texts import pages, read_text
from exports.gguf_convert import convert
from quantize.config import EvalConfig
from quantize.errors import InputError, one_line
from quantize.logs import quiet_libraries, setup_logging, stdout_to_stderr


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        protocol: ours.
        figure: such as ``ppl``.
        ours: measured by :mod:`eval.perplexity`.
        theirs: measured by ``program``.
        program: whose figure it is.
        tokens: scored here; ``llama-perplexity`` scores the same number, lm-eval does not tell.
    """

    protocol: str
    figure: str
    ours: float
    theirs: float
    program: str
    tokens: int

    @property
    def difference(self) -> float:
        """Ours over theirs, less 1."""
        return self.ours / self.theirs - 1


def beside_llamacpp(model: Path, text: Path, *, context: int = 512, windows: int = 16) -> list[Row]:
    """``protocol=llamacpp`` beside ``llama-perplexity -c CONTEXT --chunks WINDOWS``.

    Raises:
        InputError: the program is not there, or the text is too short.
    """
    with tempfile.TemporaryDirectory() as folder:
        convert(model, Path(folder, "model.gguf"), "F16")
        theirs = llamacpp.perplexity(Path(folder, "model.gguf"), text, context=context, chunks=windows)
    found = evaluate_artifact(model, EvalConfig(str(text), windows, context, protocol="llamacpp"))
    if found["protocol"]["tokens"] != theirs.tokens:
        raise RuntimeError(f"llama-perplexity scored {theirs.tokens} tokens, and this project {found['protocol']['tokens']}")
    return [Row("llamacpp", "ppl", found["ppl"], theirs.ppl, "llama-perplexity", theirs.tokens)]


def beside_lm_eval(model: Path, text: Path, *, window: int = 2048, number: int = 4) -> list[Row]:
    """``protocol=wikitext`` beside lm-eval's task of that name, on the first ``number`` pages of a text.

    The task is lm-eval's own but for where its pages come from: its functions, its metrics, its rolling windows.

    Raises:
        InputError: lm-eval is not installed, or the text has fewer pages.
    """
    chosen = pages(read_text(str(text), "all", 0.2))[:number]
    theirs = _run_lm_eval(model, chosen, window)
    found = evaluate_artifact(model, EvalConfig(str(text), number, window, protocol="wikitext"))
    tokens = found["protocol"]["tokens"]
    names = {"word_ppl": "word_perplexity", "byte_ppl": "byte_perplexity", "bits_per_byte": "bits_per_byte"}
    return [Row("wikitext", ours, found[ours], theirs[f"{name},none"], "lm-eval", tokens) for ours, name in names.items()]


def _run_lm_eval(model: Path, chosen: list[str], window: int) -> dict[str, Any]:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks.wikitext import preprocess_wikitext
    except ImportError as error:
        raise InputError(f"lm-eval is not installed ({one_line(error)}); pip install '.[eval]'") from error
    loaded = transformers_model.for_evaluation(transformers_model.load(model, "cpu"))
    assert isinstance(loaded, transformers_model.TransformersArtifact)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "pages.jsonl")
        file.write_text("".join(json.dumps({"page": page}) + "\n" for page in chosen))
        task = {
            "task": "wikitext_pages",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": folder},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": preprocess_wikitext.wikitext_detokenizer,
            "process_results": preprocess_wikitext.process_results,
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        }
        wrapped = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=window, batch_size=1)
        found = lm_eval.simple_evaluate(model=wrapped, tasks=[task], bootstrap_iters=0, verbosity="ERROR")
    return dict(found["results"]["wikitext_pages"])


def render(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| protocol | figure | here | there | program | difference | tokens |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {row.protocol} | {row.figure} | {row.ours:.4f} | {row.theirs:.4f} | {row.program} | {row.difference:+.4%} "
        f"| {row.tokens:,} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m eval.agreement", description="Our perplexities beside other programs'.")
    parser.add_argument("model", type=Path, help="unquantized model directory")
    parser.add_argument("--text", type=Path, required=True, help="text file, such as WikiText's wiki.test.raw")
    parser.add_argument("--context", type=int, default=512, help="llama-perplexity's -c")
    parser.add_argument("--windows", type=int, default=16, help="windows for llama-perplexity")
    parser.add_argument("--seq-len", type=int, default=2048, help="lm-eval's max_length")
    parser.add_argument("--pages", type=int, default=4, help="pages for lm-eval")
    options = parser.parse_args(arguments)
    setup_logging("warning")
    quiet_libraries()
    sides: list[Callable[[], list[Row]]] = [
        lambda: beside_llamacpp(options.model, options.text, context=options.context, windows=options.windows),
        lambda: beside_lm_eval(options.model, options.text, window=options.seq_len, number=options.pages),
    ]
    try:
        with stdout_to_stderr(shown=False):
            rows = [row for side in sides for row in side()]
    except InputError as error:
        logging.getLogger("eval").error("%s", error)
        return 2
    print(render(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
