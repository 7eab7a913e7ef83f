"""References: what is understood, what is refused, and that printing one and reading it again changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from exports.registry.names import Reference, as_name, is_reference, parse_reference
from quantize.errors import InputError

DIGEST = "sha256:" + "0f" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("local:artifacts/registry//demo-int4", Reference("local", "artifacts/registry", "demo-int4")),
        ("local:/a b/c:d//x//demo/int4:v1.0", Reference("local", "/a b/c:d//x", "demo/int4", "v1.0")),
        (f"local:r//demo@{DIGEST}", Reference("local", "r", "demo", "latest", DIGEST)),
        (f"local:r//demo:v2@{DIGEST}", Reference("local", "r", "demo", "v2", DIGEST)),
        ("oci:127.0.0.1:5000/a/b:c", Reference("oci", "127.0.0.1:5000", "a/b", "c")),
        ("hub:Me/My-Model.v2:main", Reference("hub", "", "Me/My-Model.v2", "main")),
        ("mlflow:http://127.0.0.1:5000//demo:champion", Reference("mlflow", "http://127.0.0.1:5000", "demo", "champion")),
    ],
)
def test_references_are_taken_apart_and_put_together_again(text: str, expected: Reference) -> None:
    assert parse_reference(text) == expected
    assert parse_reference(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("artifacts/registry//demo", "no reference"),
        ("ftp:host//demo", "no reference"),
        ("local:demo", "no registry or no name"),
        ("local://demo", "no registry or no name"),
        ("mlflow:http://host", "no registry or no name"),
        ("oci:demo", "no host or no name"),
        ("local:r//", "the name ''"),
        ("local:r//../x", "the name '../x'"),
        ("local:r//Demo", "lower-case"),
        ("local:r//a/_tags", "the name"),
        ("local:r//" + "a" * 201, "the name"),
        ("hub:a/b/c", "the name"),
        ("local:r//demo:", "the tag ''"),
        ("local:r//demo:.x", "the tag"),
        ("local:r//demo:a/b", "the tag"),
        ("local:r//demo:" + "t" * 129, "the tag"),
        ("local:r//demo@sha256:abc", "no digest"),
        (f"local:r//demo@{DIGEST.upper()}", "not allowed"),
        (f"local:r//demo@{DIGEST}0", "no digest"),
        ("local:r//demo\n", "the name"),
        ("local:r//demo:v1\n", "the tag"),
    ],
)
def test_everything_else_is_refused_with_a_form_that_works(text: str, said: str) -> None:
    with pytest.raises(InputError, match=r"use |such as") as caught:
        parse_reference(text)
    assert said in str(caught.value)


def test_a_path_is_no_reference() -> None:
    assert is_reference("local:x//y")
    assert not is_reference("artifacts/demo/variants/int4")
    assert not is_reference("local")


@given(st.text(max_size=40))
@example("SmolLM2-135M-Instruct_FP16")
@example("a/..//b")
@example("a\n")
def test_any_text_makes_a_name_or_is_refused(text: str) -> None:
    try:
        name = as_name(text)
    except InputError:
        assert not any(letter.isascii() and letter.isalnum() for letter in text)
        return
    assert parse_reference(f"local:r//{name}").name == name
