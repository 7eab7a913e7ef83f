"""Log-likelihoods from llama-server: sums of what it reports of the tokens asked for, and those of transformers."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from eval.consumers.gguf_model import CONSUMER
from eval.llamacpp_tools import find_tool
from eval.tasks import evaluate_tasks
from eval.tasks_llamacpp import ServerLM, server_lm
from quantize.errors import InputError

with_server = pytest.mark.skipif(find_tool("llama-server") is None, reason="needs llama.cpp's tools: `make llamacpp`")
BOS, EOS, FIRST = 1, 2, 3
LETTERS = "abcdefgh "


class Bigrams:
    """A server whose model knows only which letter follows which: one token a letter."""

    def __init__(self) -> None:
        size = FIRST + len(LETTERS)
        self.logprobs = torch.log_softmax(torch.randn(size, size, generator=torch.Generator().manual_seed(5)), -1)
        self.longest = 0
        self.broken: dict[str, Any] = {}

    def __call__(self, method: str, url: str, value: Any) -> dict[str, Any]:
        if url == "/props":
            return {"bos_token": "<s>", "eos_token": "</s>"}
        if url == "/tokenize":
            special = {"<s>": [BOS], "</s>": [EOS]}.get(value["content"])
            letters = [FIRST + LETTERS.index(letter) for letter in value["content"]] if special is None else special
            return {"tokens": [BOS] * value["add_special"] + letters}
        self.longest = max(self.longest, len(value["prompt"]))
        row = self.logprobs[value["prompt"][-1]]
        if "logit_bias" not in value:
            return {"content": "abba abba"}
        chosen = int(torch.argmax(row + torch.zeros_like(row).index_add(0, *self.bias(value))))
        likeliest = {"id": int(row.argmax()), "logprob": float(row.max())}
        found = {"id": chosen, "logprob": float(row[chosen]), "top_logprobs": [likeliest], **self.broken}
        return {"completion_probabilities": [found]}

    @staticmethod
    def bias(value: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, biases = zip(*value["logit_bias"], strict=True)
        return torch.tensor(tokens), torch.tensor(biases)

    def score(self, tokens: list[int]) -> float:
        return sum(float(self.logprobs[before, after]) for before, after in itertools.pairwise(tokens))


def asked(context: str, continuation: str) -> list[Instance]:
    return [Instance("loglikelihood", {}, (context, continuation), 0)]


def ids(text: str) -> list[int]:
    return [FIRST + LETTERS.index(letter) for letter in text]


@given(st.text(LETTERS, max_size=9).map(str.strip), st.text(LETTERS, min_size=1, max_size=9))
def test_a_score_is_the_sum_over_the_continuations_tokens(context: str, continuation: str) -> None:
    model = Bigrams()
    (found, _), *_rest = ServerLM(model, 64).loglikelihood(asked(context, continuation))
    before = [BOS, *ids(context)]
    assert found == pytest.approx(model.score([before[-1], *ids(continuation)]), rel=1e-5)


@given(st.text(LETTERS, min_size=1, max_size=40), st.integers(4, 12))
def test_texts_are_scored_once_in_windows(text: str, context: int) -> None:
    model = Bigrams()
    found = ServerLM(model, context).loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    # A bigram model needs one token of context, so windows change nothing.
    assert found == [pytest.approx(model.score([BOS, *ids(text)]), rel=1e-5)]
    assert model.longest < context


def test_likeliest_continuations_are_known() -> None:
    model = Bigrams()
    letter = FIRST + 2
    while (best := int(model.logprobs[letter].argmax())) < FIRST:
        letter += 1
    other = next(token for token in range(FIRST, FIRST + len(LETTERS)) if token != best)
    for token, likeliest in ((best, True), (other, False)):
        pair = (LETTERS[letter - FIRST], LETTERS[token - FIRST])
        assert ServerLM(model).loglikelihood(asked(*pair))[0][1] is likeliest


def test_generation_ends_where_the_task_says() -> None:
    settings: dict[str, Any] = {"until": [" "], "max_gen_toks": 8}
    lm = ServerLM(Bigrams(), 64)
    assert lm.generate_until([Instance("generate_until", {}, ("ab", settings), 0)]) == ["abba"]
    with pytest.raises(InputError, match="samples"):
        lm.generate_until([Instance("generate_until", {}, ("ab", {**settings, "do_sample": True}), 0)])


@pytest.mark.parametrize(
    "broken", [{"id": 0}, {"top_logprobs": []}, {"logprob": None}, {"id": None}], ids=["other", "no top", "no figure", "no id"]
)
def test_an_answer_to_another_question_is_refused(broken: dict[str, Any]) -> None:
    model = Bigrams()
    model.broken = broken
    with pytest.raises(InputError, match="gave no probability of token"):
        ServerLM(model).loglikelihood(asked("a", "b"))


def test_impossible_tokens_have_a_finite_score() -> None:
    model = Bigrams()
    model.broken = {"logprob": -3.4e38}
    assert ServerLM(model).loglikelihood(asked("a", "b"))[0][0] == -104


def test_long_texts_are_refused() -> None:
    with pytest.raises(InputError, match=r"a text of 12 tokens is longer than llama-server's context of 8"):
        ServerLM(Bigrams(), 8).loglikelihood(asked("abcdef", "abcde"))


@with_server
def test_the_servers_log_likelihoods_are_transformers(tiny_gguf: Path) -> None:
    loaded = CONSUMER.for_evaluation(CONSUMER.load(tiny_gguf.parent, "cpu"))
    pairs = [("Statements assign", " values to names"), ("Statements assign", " nothing"), ("The class", " body"), ("", "If")]
    with server_lm(tiny_gguf, context=128) as lm:
        found = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
        for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
            prefix = loaded.tokenizer(context)["input_ids"] if context else [loaded.tokenizer.bos_token_id]
            tokens = loaded.tokenizer(continuation, add_special_tokens=False)["input_ids"]
            logprobs = torch.log_softmax(loaded.logits(torch.tensor([prefix + tokens]))[0].float(), -1)
            rows = logprobs[len(prefix) - 1 : -1]
            expected = sum(float(row[token]) for row, token in zip(rows, tokens, strict=True))
            # llama.cpp keeps keys and values in float16 and multiplies in it.
            assert value == pytest.approx(expected, abs=0.02 * len(tokens)), (context, continuation)
            assert greedy == all(int(row.argmax()) == token for row, token in zip(rows, tokens, strict=True))
            assert math.isfinite(value)


@with_server
def test_a_gguf_file_answers_in_llama_cpp_as_in_transformers(tiny_gguf: Path) -> None:
    runs = [
        evaluate_tasks(tiny_gguf.parent, ["builtin"], limit=3, consumer=name)["builtin"] for name in ("auto", "transformers")
    ]
    assert [run["consumer"].split()[0] for run in runs] == ["llama.cpp", "transformers"]
    assert runs[0]["items"] == runs[1]["items"] and runs[0]["definition"] == runs[1]["definition"]
    assert abs(runs[0]["value"] - runs[1]["value"]) <= 1 / 6


@with_server
def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="llama-server"):
        evaluate_tasks(tmp_path, ["builtin"], limit=1, consumer="llamacpp")
