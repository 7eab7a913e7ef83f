"""Planted secrets do not come out of logs, messages, manifests."""

from __future__ import annotations

import base64
import io
import logging
from urllib.parse import quote

import pytest

from exports.registry.secrets import RedactingFilter, holds_secret, known_secrets, redact, redact_values

PLANTED = "s3cr3t/planted+value"


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_PASSWORD", PLANTED)


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "MLFLOW_TRACKING_TOKEN",
        "MY_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "PASSWORD",
        "DB_PASSWD",
        "HUGGINGFACEHUB_API_TOKEN",
    ],
)
def test_variables_named_like_secrets_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "another-value")
    assert "another-value" in known_secrets()


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "SSH_AUTH_SOCK", "MAX_TOKENS", "GIT_AUTHOR_NAME", "PATH"]
)
def test_other_variables_are_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "ordinary-value")
    assert "ordinary-value" not in known_secrets()


@pytest.mark.parametrize(
    "text",
    [
        f"cannot reach host with {PLANTED}",
        f"GET /v2/?token={quote(PLANTED, safe='')}",
        f"auth {base64.b64encode(PLANTED.encode()).decode()}",
    ],
)
def test_the_environments_secrets_are_replaced_in_every_form(text: str) -> None:
    assert "***" in redact(text)
    assert PLANTED not in redact(text) and quote(PLANTED, safe="") not in redact(text)
    assert base64.b64encode(PLANTED.encode()).decode() not in redact(text)


def test_secrets_are_known_by_their_place_and_their_form() -> None:
    assert redact("at https://me:pw@host/x and http://tok@h") == "at https://***@host/x and http://***@h"
    assert redact("Authorization: Bearer abcdef.ghi-jkl") == "Authorization: Bearer ***"
    assert redact("it is hf_" + "aB3" * 11) == "it is ***"
    assert redact("ghp_" + "a1B2" * 9) == "***"
    plain = "ratio 1.02 at https://host/me@1.0; basic idea; sha256:" + "ab" * 32
    assert redact(plain) == plain


def test_values_are_redacted_to_the_bottom() -> None:
    assert redact_values({"a": [PLANTED, 1, None], PLANTED: {"b": f"x {PLANTED}"}}) == {
        "a": ["***", 1, None],
        "***": {"b": "x ***"},
    }
    assert holds_secret(f"...{PLANTED}...".encode())
    assert not holds_secret(b"nothing")


def test_the_logging_filter_covers_arguments_and_tracebacks() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(RedactingFilter())
    log = logging.Logger("test")
    log.addHandler(handler)
    log.info("pushing with %s", PLANTED)
    try:
        raise ValueError(f"denied for {PLANTED}")
    except ValueError:
        log.exception("failed at https://u:%s@host", "pw123456")
    text = stream.getvalue()
    assert PLANTED not in text and "pw123456" not in text
    assert "pushing with ***" in text and "ValueError: denied for ***" in text and "Traceback" in text
