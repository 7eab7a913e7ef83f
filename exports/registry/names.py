"""References: what a release is called, and where it is.

::

    local:DIR//NAME[:TAG][@sha256:HEX]           a directory on this machine
    oci:HOST[:PORT]/NAME[:TAG][@sha256:HEX]      an OCI registry
    hub:NAMESPACE/NAME[:TAG][@sha256:HEX]        the Hugging Face Hub
    mlflow:URI//NAME[:TAG][@sha256:HEX]          an MLflow server's model registry

Without a tag and a digest, the tag is ``latest``. With a digest, the digest decides and the tag is only a word about it.
Names and tags follow the OCI distribution specification 1.1 ("Pulling manifests"), the narrowest of the four grammars, so
that a name means the same everywhere; the Hub's names may have capital letters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantize.errors import InputError

SCHEMES = ("local", "hub", "mlflow", "oci")
DEFAULT_TAG = "latest"
_NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_HUB_NAME = re.compile(r"(?:[A-Za-z0-9]+(?:[._-]+[A-Za-z0-9]+)*/)?[A-Za-z0-9]+(?:[._-]+[A-Za-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MOST = 200  # characters of a name: with its suffixes it must fit a file system's 255
_FORM = {
    "local": "local:DIR//NAME[:TAG][@sha256:HEX], such as local:artifacts/registry//demo-int4-gptq:latest",
    "mlflow": "mlflow:URI//NAME[:TAG][@sha256:HEX], such as mlflow:http://127.0.0.1:5000//demo-int4-gptq:latest",
    "oci": "oci:HOST/NAME[:TAG][@sha256:HEX], such as oci:127.0.0.1:5000/demo-int4-gptq:latest",
    "hub": "hub:NAMESPACE/NAME[:TAG][@sha256:HEX], such as hub:me/demo-int4-gptq:latest",
}


@dataclass(frozen=True)
class Reference:
    """A release's full name.

    ``location``: the directory, URI or host of the registry, empty for the Hub. ``digest``: ``sha256:`` and 64 hex digits, or
    None where the tag decides.
    """

    scheme: str
    location: str
    name: str
    tag: str = DEFAULT_TAG
    digest: str | None = None

    def __str__(self) -> str:
        separator = {"local": "//", "mlflow": "//", "oci": "/", "hub": ""}[self.scheme]
        pinned = f"@{self.digest}" if self.digest else ""
        return f"{self.scheme}:{self.location}{separator}{self.name}:{self.tag}{pinned}"


def is_reference(text: str) -> bool:
    """Whether ``text`` starts like a reference and not like a path."""
    return text.partition(":")[0] in SCHEMES and ":" in text


def parse_reference(text: str) -> Reference:
    """Take a reference apart.

    Raises:
        InputError: no known scheme, or a part that does not fit the grammar.
    """
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in SCHEMES:
        raise InputError(f"{text!r} is no reference; use {_FORM['local']}")
    rest, pinned, digest = rest.partition("@sha256:")
    if pinned:
        check_digest(f"sha256:{digest}")
    if scheme in ("local", "mlflow"):
        location, separator, name = rest.rpartition("//")
        # "http://host" without a name has its only "//" inside the address.
        if not separator or not location or location.endswith(":"):
            raise InputError(f"{text!r} says no registry or no name; use {_FORM[scheme]}")
    elif scheme == "oci":
        location, separator, name = rest.partition("/")
        if not separator or not location:
            raise InputError(f"{text!r} says no host or no name; use {_FORM[scheme]}")
    else:
        location, name = "", rest
    name, has_tag, tag = name.partition(":")
    return Reference(
        scheme,
        location,
        check_name(name, scheme),
        check_tag(tag) if has_tag else DEFAULT_TAG,
        f"sha256:{digest}" if pinned else None,
    )


def check_name(name: str, scheme: str = "local") -> str:
    """The name itself, where the grammar allows it.

    Raises:
        InputError: it does not.
    """
    if len(name) <= _MOST and (_HUB_NAME if scheme == "hub" else _NAME).fullmatch(name):
        return name
    letters = "letters" if scheme == "hub" else "lower-case letters"
    raise InputError(
        f"the name {name[:_MOST]!r} is not allowed; use {letters} and digits, with single '.', '_' or '-' between them and '/' "
        f"between parts, at most {_MOST} characters, such as demo-int4-gptq"
    )


def check_tag(tag: str) -> str:
    """The tag itself, where the grammar allows it.

    Raises:
        InputError: it does not.
    """
    if _TAG.fullmatch(tag):
        return tag
    raise InputError(
        f"the tag {tag[:128]!r} is not allowed; use letters, digits, '.', '_' and '-', at most 128, such as latest or v1.0"
    )


def check_digest(digest: str) -> str:
    """The digest itself, where it is ``sha256:`` and 64 lower-case hex digits.

    Raises:
        InputError: it is not.
    """
    if _DIGEST.fullmatch(digest):
        return digest
    raise InputError(f"{digest[:80]!r} is no digest; use sha256: and 64 lower-case hexadecimal digits")


def as_name(text: str) -> str:
    """A name made of any text: lower case, and '-' for everything the grammar does not allow.

    Raises:
        InputError: nothing is left of it.
    """
    parts = [re.sub(r"[^a-z0-9]+$|^[^a-z0-9]+", "", re.sub(r"[^a-z0-9]+", _join, part.lower())) for part in text.split("/")]
    return check_name("/".join(part for part in parts if part)[:_MOST])


def _join(match: re.Match[str]) -> str:
    return match[0] if match[0] in (".", "_", "-") else "-"
