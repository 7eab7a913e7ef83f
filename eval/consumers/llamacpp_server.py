"""Greedy continuations by llama.cpp, with the token ids: from ``llama-server``, on a socket that only this process knows.

Of llama.cpp's programs only the server gives the ids of what it generates. It listens on a UNIX socket in a folder of its own,
so that no port has to be found free, and ends with the call.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.consumers.llamacpp_output import failed
from eval.llamacpp_tools import tool
from quantize.errors import InputError

LIMIT = 600.0  # seconds for loading the model, and again for a continuation
_SPARE_TOKENS = 64  # of the context, for the pieces that a prompt's characters become
_POLL = 0.1  # seconds


@dataclass(frozen=True)
class Continuation:
    """What a model says after a prompt.

    Attributes:
        text: of the new tokens, special ones left out.
        ids: token ids of the new tokens; the one that ended the text may be among them.
        prompt_tokens: tokens of the prompt, BOS included where the model adds it.
    """

    text: str
    ids: tuple[int, ...]
    prompt_tokens: int


class _Connection(http.client.HTTPConnection):
    """HTTP on a UNIX socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def generate(model: Path, prompt: str | Sequence[int], count: int, *, limit: float = LIMIT) -> Continuation:
    """Continue a prompt greedily, without any chat template.

    Args:
        model: the GGUF file.
        prompt: text, or token ids, which are taken as they are.
        count: new tokens at most; an end-of-text token ends it earlier.
        limit: seconds for loading the model, and again for the continuation.

    Raises:
        InputError: the program is missing, does not load the model, or does not answer in time.
    """
    if not model.is_file():
        raise InputError(f"model {model} does not exist; give a GGUF file")
    request = {
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "n_predict": count,
        # The likeliest token always: the first of a list of one.
        "samplers": ["top_k"],
        "top_k": 1,
        "temperature": 0,
        "seed": 0,
        "return_tokens": True,
        "cache_prompt": False,
    }
    # A token is a byte of the prompt at least.
    size = len(prompt.encode()) if isinstance(prompt, str) else len(prompt)
    with serving(model, size + count + _SPARE_TOKENS, limit) as path:
        status, answer = ask(path, "POST", "/completion", request, limit)
    if status != http.client.OK:
        raise failed("llama-server", f"answered {status}", answer)
    return parse_completion(answer)


def parse_completion(answer: str) -> Continuation:
    """Read the server's answer to ``/completion``.

    Raises:
        InputError: it lacks the text or the ids.
    """
    try:
        found: dict[str, Any] = json.loads(answer)
        return Continuation(found["content"], tuple(map(int, found["tokens"])), int(found["tokens_evaluated"]))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise failed("llama-server", "gave no continuation", answer) from error


@contextlib.contextmanager
def serving(model: Path, context: int, limit: float) -> Iterator[Path]:
    """A server with ``model`` and room for ``context`` tokens, ready to answer; yields its socket, and ends with the block.

    Raises:
        InputError: the program is missing, or does not load the model within ``limit`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="llama-") as folder:
        path, log = Path(folder, "s.sock"), Path(folder, "log")
        options = ["--host", str(path), "--parallel", "1", "--no-warmup", "--offline", "--ctx-size", str(context)]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [str(tool("llama-server")), "-m", str(model), *options],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait(process, path, log, limit)
            yield path
        finally:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], path: Path, log: Path, limit: float) -> None:
    """Wait until the server has loaded its model."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise failed("llama-server", f"ended (exit code {process.returncode})", _read(log))
        with contextlib.suppress(OSError, http.client.HTTPException):
            status, _ = ask(path, "GET", "/health", None, limit)
            if status == http.client.OK:
                return
        time.sleep(_POLL)
    raise failed("llama-server", f"did not load the model within {limit:g} s", _read(log))


def ask(path: Path, method: str, url: str, value: Any, limit: float) -> tuple[int, str]:
    """One request to the server on the socket ``path``; status and body of the answer.

    Raises:
        InputError: the answer takes longer than ``limit`` seconds.
    """
    connection = _Connection(path, limit)
    try:
        body = None if value is None else json.dumps(value)
        connection.request(method, url, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", errors="replace")
    except TimeoutError as error:
        raise InputError(f"llama-server did not answer within {limit:g} s; use a smaller count, or a larger limit") from error
    finally:
        connection.close()


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")
