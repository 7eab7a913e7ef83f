"""lm-eval's interface to a GGUF file that llama.cpp runs: log-likelihoods from ``llama-server``.

The server gives probabilities of the tokens it generates, not of a prompt's, so lm-eval's own models for it (``gguf``,
``local-completions``, which ask for the prompt's) get none. Here each token of a continuation is asked for by itself: a bias on
its logit makes the server choose it, and the probability that the server reports is from the logits before any bias or
sampling. It keeps the tokens before in its cache, so a token costs one step of the model, as in generation.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from eval.consumers.llamacpp_output import failed
from eval.consumers.llamacpp_server import LIMIT, ask, serving
from quantize.errors import InputError
from quantize.logs import progress

CONTEXT = 2048  # tokens
_CERTAIN = 1e6  # added to a logit: no model's logits differ by as much
_LEAST = -104.0  # natural logarithm of a number below float32's smallest, which the server takes probabilities in
_NEW_TOKENS = 256  # of texts that are generated, where the task does not say

Ask = Callable[[str, str, Any], dict[str, Any]]


class ServerLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's interface to a running server.

    Args:
        request: ``(method, url, value)`` to the answer's JSON object.
        context: tokens that the server has room for.

    Attributes:
        build: what llama.cpp calls the build.
    """

    def __init__(self, request: Ask, context: int = CONTEXT) -> None:
        super().__init__()
        self._request, self.max_length = request, context
        properties = request("GET", "/props", None)
        self.build = str(properties.get("build_info", "of unknown build"))
        self._bos, self._eos = (self._special(properties.get(name, "")) for name in ("bos_token", "eos_token"))
        if self._eos is None and self._bos is None:
            raise InputError(
                "llama-server's model has neither BOS nor EOS, which lm-eval puts before texts; use --consumer transformers"
            )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        found = self._bos if self._eos is None else self._eos
        assert found is not None
        return found

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it: BOS, or the end of another text; as for transformers."""
        return self.eot_token_id if self._bos is None else self._bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids by llama.cpp's tokenizer; BOS where the model adds it, unless told not to."""
        value = {"content": string, "add_special": add_special_tokens is not False, "parse_special": True}
        return [int(token) for token in self._request("POST", "/tokenize", value)["tokens"]]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihoods of whole texts, in windows as lm-eval cuts them."""
        found = []
        for request in progress(requests, "texts"):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            found.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations, up to a text that ends them."""
        texts = []
        for request in progress(requests, "generating"):
            prompt, settings = request.args
            if settings.get("do_sample") or settings.get("temperature", 0) > 0:
                raise InputError("llama.cpp continues texts greedily here; the task samples them: use --consumer transformers")
            until = settings.get("until", [])
            until = [until] if isinstance(until, str) else list(until)
            count = int(settings.get("max_gen_toks", _NEW_TOKENS))
            tokens = self.tok_encode(prompt)[-(self.max_length - count) :]
            value = {**_GREEDY, "prompt": tokens, "n_predict": count, "stop": until, "response_fields": ["content"]}
            text = str(self._request("POST", "/completion", value)["content"])
            for stop in until:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
        return texts

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = True, **_: Any) -> list[tuple[float, bool]]:
        return [self._score(context, continuation) for _, context, continuation in progress(list(requests), "log-likelihoods")]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Sum of ``log p`` of the continuation's tokens, and whether each is the likeliest in its place."""
        tokens = context + continuation
        if len(tokens) > self.max_length:
            raise InputError(
                f"a text of {len(tokens)} tokens is longer than llama-server's context of {self.max_length}; use --consumer "
                "transformers, or a task with shorter texts"
            )
        total, greedy = 0.0, True
        for place in range(len(tokens) - len(continuation), len(tokens)):
            logprob, is_likeliest = self._next(tokens[:place], tokens[place])
            total += logprob
            greedy &= is_likeliest
        return total, greedy

    def _next(self, prompt: list[int], token: int) -> tuple[float, bool]:
        """Natural logarithm of the probability of ``token`` after ``prompt``, and whether it is the likeliest."""
        value = {
            **_GREEDY,
            "prompt": prompt,
            "n_predict": 1,
            "logit_bias": [[token, _CERTAIN]],
            "n_probs": 1,
            "response_fields": ["completion_probabilities"],
        }
        answer = self._request("POST", "/completion", value)
        try:
            chosen = answer["completion_probabilities"][0]
            if int(chosen["id"]) == token:
                return max(float(chosen["logprob"]), _LEAST), int(chosen["top_logprobs"][0]["id"]) == token
        except (KeyError, IndexError, TypeError, ValueError):
            pass
        raise failed("llama-server", f"gave no probability of token {token}", json.dumps(answer))

    def _special(self, text: str) -> int | None:
        tokens = self.tok_encode(text, add_special_tokens=False) if text else []
        return tokens[0] if len(tokens) == 1 else None


_GREEDY = {"samplers": ["top_k"], "top_k": 1, "temperature": 0, "seed": 0, "cache_prompt": True}


@contextmanager
def server_lm(model: Path, *, context: int = CONTEXT, limit: float = LIMIT) -> Iterator[ServerLM]:
    """The interface to a GGUF file in a server that ends with the block.

    Args:
        model: the GGUF file.
        context: tokens of the longest text.
        limit: seconds for loading the model, and again for each answer.

    Raises:
        InputError: the program is missing, does not load the model, or does not answer.
    """
    with serving(model, context, limit) as path:

        def request(method: str, url: str, value: Any) -> dict[str, Any]:
            try:
                status, answer = ask(path, method, url, value, limit)
                if status == http.client.OK:
                    found: dict[str, Any] = json.loads(answer)
                    return found
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                raise failed("llama-server", f"broke off ({type(error).__name__})", "") from error
            raise failed("llama-server", f"answered {status}", answer)

        yield ServerLM(request, context)
