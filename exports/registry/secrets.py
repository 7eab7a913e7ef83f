"""Tokens and passwords stay out of logs, messages and what is published.

What counts as a secret: the values of environment variables that are named like one (``HF_TOKEN``, ``AWS_SECRET_ACCESS_KEY``,
``MLFLOW_TRACKING_PASSWORD``), what stands in front of the ``@`` in a URL, what follows ``Bearer`` or ``Basic`` in a header, and
words of the forms that the Hub, GitHub and others give their tokens. Values of fewer than 6 characters are no secrets here:
replacing them would spoil ordinary text.
"""

from __future__ import annotations

import base64
import logging
import os
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
_SHORTEST = 6
_NAMED = re.compile(
    r"(?:^|_)(?:\w*TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS?|AUTH)(?:_|$)"
)
# Names that only look like one: where a secret is kept, whether it is used, a socket.
_HARMLESS = re.compile(r"_(?:PATH|FILE|DIR|SOCK)$|DISABLE|ENABLE")
_USERINFO = re.compile(r"(?<=://)[^\s/@'\"<>]+(?=@)")
_HEADER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}")
_SHAPED = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|AKIA[0-9A-Z]{16})\b"
)


def known_secrets() -> list[str]:
    """The environment's secrets and the forms in which they travel (URL-quoted, base64), the longest first."""
    found: set[str] = set()
    for name, value in os.environ.items():
        value = value.strip()
        named = name.upper()
        if len(value) >= _SHORTEST and _NAMED.search(named) and not _HARMLESS.search(named):
            found |= {value, quote(value, safe=""), base64.b64encode(value.encode()).decode()}
    return sorted(found, key=lambda each: (-len(each), each))


def redact(text: str) -> str:
    """The text with every secret replaced by ``***``."""
    for secret in known_secrets():
        text = text.replace(secret, HIDDEN)
    text = _USERINFO.sub(HIDDEN, text)
    text = _HEADER.sub(lambda match: f"{match[1]} {HIDDEN}", text)
    return _SHAPED.sub(HIDDEN, text)


def holds_secret(data: bytes, secrets: Iterable[str] | None = None) -> bool:
    """Whether ``data`` has one of the environment's secrets in it; ``secrets``: those, where they are known already."""
    return any(secret.encode() in data for secret in (known_secrets() if secrets is None else secrets))


class RedactingFilter(logging.Filter):
    """For a log handler: records pass with their secrets replaced, in the message, in the traceback and in its cause."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True; the record is changed in place."""
        record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
            # A handler that formats tracebacks itself (rich) would show it once more, and whole.
            record.msg, record.exc_info = f"{record.msg}\n{record.exc_text}".strip(), None
            record.exc_text = None
        elif record.exc_text:
            record.exc_text = redact(record.exc_text)
        return True


def redact_values(value: Any) -> Any:
    """A JSON value with the secrets in all of its strings replaced, keys too."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(key) if isinstance(key, str) else key: redact_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(each) for each in value]
    return value
