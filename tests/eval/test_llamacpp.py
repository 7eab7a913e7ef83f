"""llama.cpp as a consumer: its real outputs read, its failures named, and the programs themselves where they are built.

The files in ``recorded`` are what llama.cpp printed for a quantized SmolLM2-135M.
"""

from __future__ import annotations

import json
import math
import pydoc_data.topics
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from calibration.imatrix import main as collect_imatrix
from calibration.sources import load_text
from eval.consumers import llamacpp
from eval.consumers.llamacpp_output import Divergence, Perplexity, parse_bench, parse_divergence, parse_perplexity
from eval.consumers.llamacpp_server import Continuation, generate, parse_completion
from eval.llamacpp_tools import TOOLS, VARIABLE, find_tool
from exports.gguf_convert import convert
from exports.imatrix import read
from quantize.demo_model import demo_model
from quantize.errors import InputError

RECORDED = Path(__file__).parent / "recorded"
PPL, PPL_ERROR = 32.688, 7.36175
DIVERGENCE = Divergence(
    mean=0.496137,
    mean_error=0.033884,
    median=0.374974,
    p99=2.197121,
    maximum=5.619641,
    same_top=63.889 / 100,
    ppl=43.154958,
    ppl_error=9.762251,
    base_ppl=32.578966,
    tokens=4 * 63,
    seconds=12.5,
)
CONTINUATION = Continuation(
    text=" the largest city in France. It is the seat of the",
    ids=(260, 3995, 2240, 281, 4649, 30, 657, 314, 260, 8952, 282, 260),
    prompt_tokens=5,
)
MakeTool = Callable[[str, str], Path]

with_llamacpp = pytest.mark.skipif(
    any(find_tool(name) is None for name in TOOLS), reason="needs llama.cpp's tools: `make llamacpp`"
)


def recorded(name: str) -> str:
    return (RECORDED / name).read_text(encoding="utf-8")


@pytest.fixture
def make_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeTool:
    """``make_tool(name, script)``: a shell script in the place of one of llama.cpp's programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv(VARIABLE, str(folder))

    def make(name: str, script: str) -> Path:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
        return folder / name

    return make


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path / "model.gguf"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Prose of some thousand tokens of the tiny tokenizer."""
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(pydoc_data.topics.topics[name].strip() for name in ("assignment", "class", "with")))
    return file


def test_perplexity_is_read() -> None:
    found = parse_perplexity(recorded("llama-perplexity.txt"), 12.5)
    assert found == Perplexity(ppl=PPL, error=PPL_ERROR, chunks=4, tokens=4 * 63, seconds=12.5)


def test_divergence_is_read() -> None:
    found = parse_divergence(recorded("llama-perplexity-kl.txt"), 12.5)
    assert found == DIVERGENCE
    assert found.median < found.mean < found.p99 < found.maximum


def test_speed_is_read() -> None:
    found = parse_bench(recorded("llama-bench.json"))
    rows = json.loads(recorded("llama-bench.json"))
    assert [row["avg_ts"] for row in rows] == [found.prompt, found.generation]
    assert [row["stddev_ts"] for row in rows] == [found.prompt_deviation, found.generation_deviation]
    assert found.threads == rows[0]["n_threads"]


def test_a_continuation_is_read() -> None:
    found = parse_completion(recorded("llama-server.json"))
    assert found == CONTINUATION


@given(cut=st.integers(0, 5000))
def test_half_an_output_is_no_answer(cut: int) -> None:
    for name, parse in (("llama-perplexity.txt", parse_perplexity), ("llama-perplexity-kl.txt", parse_divergence)):
        whole = recorded(name)
        part = whole[: max(0, min(cut, len(whole) - 1))]
        try:
            assert parse(part, 0.0) == parse(whole, 0.0)
        except InputError as error:
            assert "gave no" in str(error)
    with pytest.raises(InputError, match="gave no measurements"):
        parse_bench(recorded("llama-bench.json")[:-3])


@pytest.mark.parametrize("output", ["", "[]", "{}", "null", '[{"n_prompt": 1}]', "[1]"])
def test_other_json_is_no_measurement(output: str) -> None:
    with pytest.raises(InputError, match="llama-bench gave no measurements"):
        parse_bench(output)
    with pytest.raises(InputError, match="llama-server gave no continuation"):
        parse_completion(output)


def test_a_model_that_diverged_has_no_perplexity() -> None:
    whole = recorded("llama-perplexity.txt").replace(f"PPL = {PPL:.4f}", "PPL = nan")
    with pytest.raises(InputError, match="found a perplexity of nan"):
        parse_perplexity(whole, 0.0)


def test_the_programs_get_what_they_need(make_tool: MakeTool, model: Path, text: Path, tmp_path: Path) -> None:
    make_tool("llama-perplexity", f'echo "$@" > "{tmp_path}/seen"; cat "{RECORDED}/llama-perplexity.txt" >&2')
    found = llamacpp.perplexity(model, text, context=768, chunks=4)
    assert found.ppl == PPL and found.seconds > 0
    # Windows of 768 tokens fill a batch of 1,536; with the default of 2,048 the program aborts.
    assert (tmp_path / "seen").read_text().split() == f"-m {model} -f {text} -c 768 -b 1536 --chunks 4".split()


@given(context=st.integers(1, 5000))
def test_a_batch_is_whole_windows(context: int) -> None:
    batch = llamacpp.batch_of(context)
    assert batch < context if context > 2048 else batch % context == 0 and 1024 < batch <= 2048


def test_logits_are_whole_or_absent(make_tool: MakeTool, model: Path, text: Path, tmp_path: Path) -> None:
    script = 'for last; do :; done; printf "_logits_" > "$last"; printf "\\000\\002\\000\\000" >> "$last"; '
    make_tool("llama-perplexity", script + f'cat "{RECORDED}/llama-perplexity.txt"')
    llamacpp.save_logits(model, text, tmp_path / "base.logits", chunks=4)
    assert llamacpp.context_of(tmp_path / "base.logits") == 512
    make_tool("llama-perplexity", script + "echo out of memory; exit 1")
    with pytest.raises(InputError, match=r"failed \(exit code 1\); its last lines: out of memory"):
        llamacpp.save_logits(model, text, tmp_path / "other.logits", chunks=4)
    assert not list(tmp_path.glob("*other.logits*"))


def test_the_context_is_the_logits_own(make_tool: MakeTool, model: Path, tmp_path: Path) -> None:
    logits = tmp_path / "base.logits"
    logits.write_bytes(b"_logits_" + struct.pack("<I", 1024))
    make_tool("llama-perplexity", f'echo "$@" > "{tmp_path}/seen"; cat "{RECORDED}/llama-perplexity-kl.txt"')
    assert llamacpp.kl_divergence(model, logits).mean == DIVERGENCE.mean
    assert "-c 1024 -b 2048" in (tmp_path / "seen").read_text()
    make_tool("llama-perplexity", f'echo "inconsistent vocabulary (1 vs 2)"; cat "{RECORDED}/llama-perplexity-kl.txt"')
    with pytest.raises(InputError, match="another vocabulary"):
        llamacpp.kl_divergence(model, logits)
    make_tool("llama-perplexity", "echo 'kl_divergence: computing over 3 chunks, n_ctx=64, batch_size=64'")
    with pytest.raises(InputError, match="has 93 tokens; make it of 100 or more"):
        llamacpp.kl_divergence(model, logits)
    logits.write_bytes(b"_logits_")
    with pytest.raises(InputError, match="holds no log-probabilities"):
        llamacpp.kl_divergence(model, logits)


def test_lost_last_words_are_asked_for_again(make_tool: MakeTool, model: Path, text: Path, tmp_path: Path) -> None:
    count = f'echo x >> "{tmp_path}/runs"; '
    whole = RECORDED / "llama-perplexity.txt"
    make_tool("llama-perplexity", count + f'[ $(wc -l < "{tmp_path}/runs") -lt 3 ] && exec head -n 3 "{whole}"; cat "{whole}"')
    assert llamacpp.perplexity(model, text, chunks=4).ppl == PPL
    assert (tmp_path / "runs").read_text().split() == ["x"] * 3
    make_tool("llama-perplexity", count + f'head -n 3 "{whole}"')
    with pytest.raises(InputError, match="gave no perplexity"):
        llamacpp.perplexity(model, text, chunks=4)
    assert len((tmp_path / "runs").read_text().split()) == 3 + 20
    # What was said to be an error is one.
    make_tool("llama-perplexity", count + "echo '0.01.234.567 E failed to decode'")
    with pytest.raises(InputError, match="failed to decode"):
        llamacpp.perplexity(model, text, chunks=4)
    assert len((tmp_path / "runs").read_text().split()) == 3 + 20 + 1


def test_failures_are_named_with_the_last_lines(make_tool: MakeTool, model: Path, text: Path, tmp_path: Path) -> None:
    make_tool("llama-bench", "echo '[' ; echo loading >&2; echo 'error: unable to load model' >&2; exit 7")
    with pytest.raises(InputError, match=r"llama-bench failed \(exit code 7\).*loading \| error: unable to load model"):
        llamacpp.bench(model)
    make_tool("llama-bench", "kill -9 $$")
    with pytest.raises(InputError, match="died of signal 9"):
        llamacpp.bench(model)
    make_tool("llama-quantize", "echo thinking; exec sleep 60")
    with pytest.raises(InputError, match=r"was stopped after 0\.5 s; its last lines: thinking"):
        llamacpp.quantize(model, tmp_path / "out.gguf", "Q4_0", limit=0.5)
    make_tool("llama-quantize", "echo nothing to do")
    with pytest.raises(InputError, match="wrote no file"):
        llamacpp.quantize(model, tmp_path / "out.gguf", "Q4_0")
    make_tool("llama-imatrix", "echo 'you need at least 1024 tokens for a context of 512 tokens'")
    with pytest.raises(InputError, match="use fewer chunks or a longer text"):
        llamacpp.importance_matrix(model, text, tmp_path / "i.gguf")
    make_tool("llama-perplexity", f'cat "{RECORDED}/llama-perplexity.txt"')
    with pytest.raises(InputError, match="found only 4 of 5 windows"):
        llamacpp.perplexity(model, text, chunks=5)


def test_what_is_missing_is_named(make_tool: MakeTool, model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run `make llamacpp`"):
        llamacpp.perplexity(model, text)
    with pytest.raises(InputError, match="run `make llamacpp`"):
        generate(model, "text", 3)
    for call in (
        lambda: llamacpp.perplexity(tmp_path / "none", text),
        lambda: llamacpp.perplexity(model, tmp_path / "none"),
        lambda: llamacpp.quantize(model, tmp_path / "out", "Q4_0", imatrix=tmp_path / "none"),
        lambda: generate(tmp_path / "none", "text", 3),
    ):
        with pytest.raises(InputError, match="none does not exist"):
            call()


SERVER = f"""
exec {sys.executable} - "$@" <<'END'
import http.server, json, socketserver, sys, time
options = dict(zip(sys.argv[1::1], sys.argv[2::1]))
class Handler(http.server.BaseHTTPRequestHandler):
    loading = 2
    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        Handler.loading -= 1
        self.answer(503 if Handler.loading >= 0 else 200, b"{{}}")
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if request["prompt"] == "fail":
            return self.answer(400, b"context size exceeded")
        if request["prompt"] == "hang":
            time.sleep(60)
        tokens = list(range(request["n_predict"]))
        told = {{"content": json.dumps([request, options["--ctx-size"]]), "tokens": tokens, "tokens_evaluated": 3}}
        self.answer(200, json.dumps(told).encode())
    def address_string(self):
        return "socket"
class Server(socketserver.UnixStreamServer):
    pass
Server(options["--host"], Handler).serve_forever()
END
"""


def test_the_server_is_asked_greedily_and_ended(make_tool: MakeTool, model: Path) -> None:
    make_tool("llama-server", SERVER)
    found = generate(model, "héllo", 5)
    request, context = json.loads(found.text)
    assert found.ids == (0, 1, 2, 3, 4) and found.prompt_tokens == 3
    assert request["prompt"] == "héllo" and request["top_k"] == 1 and request["return_tokens"] is True
    assert int(context) >= len("héllo".encode()) + 5
    assert json.loads(generate(model, [3, 1, 2], 4).text)[0]["prompt"] == [3, 1, 2]
    with pytest.raises(InputError, match="answered 400; its last lines: context size exceeded"):
        generate(model, "fail", 5)
    with pytest.raises(InputError, match="did not answer within 3 s"):
        generate(model, "hang", 5, limit=3)


def test_a_server_that_does_not_load_says_why(make_tool: MakeTool, model: Path) -> None:
    make_tool("llama-server", "echo 'error loading model: tensor missing'; exit 1")
    with pytest.raises(InputError, match=r"ended \(exit code 1\); its last lines: error loading model: tensor missing"):
        generate(model, "text", 3)
    make_tool("llama-server", "echo loading; exec sleep 60")
    with pytest.raises(InputError, match=r"did not load the model within 0\.5 s; its last lines: loading"):
        generate(model, "text", 3, limit=0.5)


@torch.no_grad()
def own_nll(model_path: Path, ids: list[int], context: int, chunks: int) -> float:
    """Mean negative log-likelihood by llama.cpp's protocol, of transformers' model in float32."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    windows = torch.tensor(ids[: context * chunks]).view(chunks, context)
    scores = model(windows, use_cache=False).logits.log_softmax(-1)[:, context // 2 : -1]
    return -float(scores.gather(-1, windows[:, context // 2 + 1 :, None]).mean())


@with_llamacpp
def test_llama_cpps_perplexity_is_transformers(
    tiny_gguf: Path, tiny_llama: Path, tiny_tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    found = llamacpp.save_logits(tiny_gguf, text, tmp_path / "base.logits", context=128, chunks=4)
    expected = own_nll(tiny_llama, tiny_tokenizer(text.read_text(), verbose=False)["input_ids"], 128, 4)
    assert found.tokens == 4 * 63
    assert math.log(found.ppl) == pytest.approx(expected, abs=2e-3)
    same = llamacpp.kl_divergence(tiny_gguf, tmp_path / "base.logits")
    assert same.same_top > 0.97 and abs(same.mean) < 1e-3 and same.ppl == pytest.approx(found.ppl, rel=1e-3)
    llamacpp.quantize(tiny_gguf, tmp_path / "q.gguf", "Q4_0", pure=True)
    coarse = llamacpp.kl_divergence(tmp_path / "q.gguf", tmp_path / "base.logits")
    assert coarse.mean > 5 * abs(same.mean) and coarse.maximum >= coarse.p99 >= coarse.median
    speed = llamacpp.bench(tmp_path / "q.gguf", prompt_tokens=16, generated_tokens=4, repetitions=1)
    assert speed.prompt > 0 and speed.generation > 0 and speed.threads >= 1


@with_llamacpp
def test_llama_cpp_continues_as_transformers(tiny_gguf: Path, tiny_llama: Path) -> None:
    prompt = torch.randint(2, 300, (12,), generator=torch.Generator().manual_seed(5))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    expected = model.generate(prompt[None], max_new_tokens=16, do_sample=False)[0, 12:].tolist()
    found = generate(tiny_gguf, prompt.tolist(), 16)
    assert list(found.ids) == expected and found.prompt_tokens == 12
    assert found == generate(tiny_gguf, prompt.tolist(), 16)


@with_llamacpp
def test_real_failures_are_errors(incomplete_gguf: Path, tiny_gguf: Path, text: Path, tmp_path: Path) -> None:
    # Only that they fail: a busy machine loses the programs' last lines, which say why.
    with pytest.raises(InputError, match=r"llama-perplexity failed \(exit code 1\)"):
        llamacpp.perplexity(incomplete_gguf, text, context=128, chunks=2)
    with pytest.raises(InputError, match="llama-server ended"):
        generate(incomplete_gguf, "text", 3)
    with pytest.raises(InputError, match="llama-quantize failed"):
        llamacpp.quantize(tiny_gguf, tmp_path / "q.gguf", "Q9_9")
    assert not list(tmp_path.glob("*q.gguf*"))
    text.write_text("too short")
    with pytest.raises(InputError, match="use fewer chunks or a longer text"):
        llamacpp.perplexity(tiny_gguf, text, context=128, chunks=2)
    with pytest.raises(InputError, match=r"llama-imatrix failed \(exit code 1\)"):
        llamacpp.importance_matrix(tiny_gguf, text, tmp_path / "i.gguf", context=128, chunks=2)


@with_llamacpp
def test_our_importance_matrix_is_llama_imatrixs(tiny_gguf: Path, tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    llamacpp.importance_matrix(tiny_gguf, text, theirs, context=128, chunks=5)
    sizes = ["--chunks", "5", "--seq-len", "128", "--in-order", "--part", "all", "--device", "cpu"]
    assert collect_imatrix([str(tiny_llama), str(ours), "--text", str(text), *sizes]) == 0
    expected, found = read(theirs), read(ours)
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        assert found[name].counts.tolist() == entry.counts.tolist() == [5 * 128]
        # llama.cpp rounds inputs to the 16 bits of the weights as it multiplies.
        np.testing.assert_allclose(found[name].sums, entry.sums, rtol=0.01, err_msg=name)
    for imatrix, target in ((theirs, tmp_path / "a.gguf"), (ours, tmp_path / "b.gguf")):
        llamacpp.quantize(tiny_gguf, target, "Q4_0", imatrix=imatrix)
    first, second = (llamacpp.perplexity(tmp_path / name, text, context=128, chunks=4).ppl for name in ("a.gguf", "b.gguf"))
    assert second == pytest.approx(first, rel=0.005)


@pytest.mark.slow
@with_llamacpp
def test_our_importance_matrix_serves_the_demo_model_as_well(tmp_path: Path) -> None:
    model, base, text = demo_model(), tmp_path / "base.gguf", tmp_path / "text.txt"
    convert(model, base, "F16")
    # As load_text reads it back: paragraphs, an empty line between them.
    text.write_text("\n\n".join(load_text("builtin", "all").text.split("\n\n")[:600]))
    text.write_text(load_text("text", "all", path=str(text)).text)
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    llamacpp.importance_matrix(base, text, theirs, context=512, chunks=8)
    sizes = ["--chunks", "8", "--seq-len", "512", "--in-order", "--part", "all", "--device", "cpu"]
    assert collect_imatrix([str(model), str(ours), "--text", str(text), *sizes]) == 0
    expected, found = read(theirs), read(ours)
    assert found.keys() == expected.keys() and len(found) == 210
    for name, entry in expected.items():
        assert found[name].counts.tolist() == entry.counts.tolist() == [8 * 512]
        np.testing.assert_allclose(found[name].sums, entry.sums, rtol=0.02, err_msg=name)
    figures = []
    for imatrix in (theirs, ours):
        llamacpp.quantize(base, tmp_path / "q.gguf", "Q4_0", imatrix=imatrix)
        figures.append(llamacpp.perplexity(tmp_path / "q.gguf", text, context=512, chunks=4).ppl)
    assert figures[1] == pytest.approx(figures[0], rel=0.005)
