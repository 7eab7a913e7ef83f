"""Signatures: minisign's format, made and checked here, and releases that were changed after signing."""

from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exports import minisign, sign, verify
from exports import publish as publish_command
from exports.registry.base import Conflict, Damaged
from exports.registry.local import connect
from exports.registry.release import assemble, manifest_bytes, parse_release
from exports.registry.transfer import publish, pull
from exports.signing import SIGNATURE, sign_directory, sign_published
from quantize.artifact import RELEASE, write_manifest
from quantize.errors import InputError

CACHE = Path(os.environ.get("QUANTIZE_CACHE", Path.home() / ".cache" / "quantize"))
PROGRAM = CACHE / "minisign" / "usr" / "bin" / "minisign"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4)
    about = {
        "container": "gptq",
        "bits": 4,
        "bits_per_weight": 4.5,
        "base": {"name": "tiny", "license": None, "sha256": "0" * 64},
        "recipe": {},
        "versions": {},
    }
    write_manifest(folder, {**about, "name": "tiny", "solver": {"name": "gptq"}, "size_bytes": 1024})
    return folder


@pytest.fixture
def published(artifact: Path, tmp_path: Path) -> str:
    release = assemble(artifact, {"README.md": ("card", b"# Tiny")}, {"gate": {"passed": False}, "forced": True})
    return str(publish(connect("local", str(tmp_path / "registry")), "tiny", "latest", release)[0])


@pytest.fixture
def key(tmp_path: Path) -> minisign.SecretKey:
    minisign.generate(tmp_path / "key", None)
    return minisign.read_secret_key(tmp_path / "key")


@pytest.fixture
def program() -> Run:
    """``program(*arguments, cwd=...)`` runs the real minisign."""
    if not PROGRAM.is_file():
        pytest.skip(f"{PROGRAM} is missing; run `make minisign` (needs apt-get and dpkg)")
    library = next((CACHE / "minisign" / "usr" / "lib").rglob("libsodium.so.23"), PROGRAM).parent

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LD_LIBRARY_PATH": str(library)}
        command = [str(PROGRAM), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, **options)

    return run


def test_a_signed_release_is_verified_and_a_changed_one_is_not(
    published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = str(tmp_path / "signer")
    assert sign.main(["--generate", key, "--no-password"]) == 0
    assert (tmp_path / "signer").stat().st_mode & 0o777 == 0o600
    assert verify.main([published, "--public-key", f"{key}.pub"]) == 3
    assert "is not signed" in capsys.readouterr().out
    assert sign.main([published.partition("@")[0], "--key", key]) == 0
    signed = capsys.readouterr().out.partition(": signed")[0]
    assert signed.partition("@")[0] == published.partition("@")[0] and signed != published
    public = (tmp_path / "signer.pub").read_text().splitlines()[-1]
    assert verify.main([signed, "--public-key", public]) == 0
    folder = tmp_path / "pulled"
    pull(verify.parse_reference(signed), folder)
    assert verify.main([str(folder), "--public-key", public]) == 0
    assert "signed with" in capsys.readouterr().out
    # Whoever can write the directory can make its lists anew, but not the signature.
    release = parse_release((folder / RELEASE).read_bytes(), "here")
    facts = {name: value for name, value in release.facts.items() if name not in ("files", "kind", "schema")}
    (folder / RELEASE).write_bytes(manifest_bytes(release.entries, {**facts, "forced": False}))
    assert verify.main([str(folder)]) == 0
    assert verify.main([str(folder), "--public-key", public]) == 3
    assert "changed after signing" in capsys.readouterr().out
    with pytest.raises(InputError, match="only releases are signed"):
        verify.verify(str(tmp_path / "artifact"), minisign.read_public_key(public))


def test_signing_again_replaces_and_another_key_is_named(published: str, key: minisign.SecretKey, tmp_path: Path) -> None:
    minisign.generate(tmp_path / "other", None)
    other = minisign.read_secret_key(tmp_path / "other")
    pull(verify.parse_reference(published), tmp_path / "pulled")
    first = sign_directory(tmp_path / "pulled", key=other)
    again = sign_directory(tmp_path / "pulled", key=key)
    assert [entry.name for entry in again.entries].count(SIGNATURE) == 1 and first.digest != again.digest
    assert verify.verify(str(tmp_path / "pulled"), key.public) == []
    assert f"not with {other.public.name}" in verify.verify(str(tmp_path / "pulled"), other.public)[0]
    (tmp_path / "pulled" / "README.md").write_text("# Other")
    with pytest.raises(Damaged, match="is not signed: README"):
        sign_directory(tmp_path / "pulled", key=key)


def test_a_tag_that_moved_on_is_not_moved_back(published: str, artifact: Path, key: minisign.SecretKey, tmp_path: Path) -> None:
    registry = connect("local", str(tmp_path / "registry"))
    newer, _ = publish(registry, "tiny", "latest", assemble(artifact, {}, {}))
    with pytest.raises(Conflict):
        sign_published(verify.parse_reference(published), key=key)
    assert registry.tags("tiny") == {"latest": newer.digest}


@pytest.mark.parametrize("position", range(4))
def test_any_changed_line_is_found(key: minisign.SecretKey, position: int) -> None:
    signature = minisign.sign(key, b"data", "a comment")
    assert signature == minisign.sign(key, b"data", "a comment")
    assert minisign.check(key.public, b"data", signature, "x") == "a comment"
    with pytest.raises(Damaged, match="not valid"):
        minisign.check(key.public, b"datA", signature, "x")
    lines = signature.decode().splitlines()
    if position == 2:
        lines[2] += "!"
    elif position:
        raw = bytearray(base64.b64decode(lines[position]))
        raw[-1] ^= 1
        lines[position] = base64.b64encode(raw).decode()
    else:
        lines = lines[1:]
    with pytest.raises(Damaged):
        minisign.check(key.public, b"data", "\n".join(lines).encode(), "x")


def test_keys_under_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    public = minisign.generate(path, "open sesame")
    assert minisign.read_secret_key(path, "open sesame").public == public
    assert minisign.read_public_key(f"{path}.pub") == public == minisign.read_public_key(str(public))
    for password, said in ((None, "under a password"), ("wrong", "password is wrong")):
        with pytest.raises(InputError, match=said):
            minisign.read_secret_key(path, password)
    with pytest.raises(InputError, match="are not overwritten"):
        minisign.generate(path, None)
    data = bytearray(base64.b64decode(path.read_text().splitlines()[-1]))
    data[46:54] = (2**40).to_bytes(8, "little")  # what would take all memory there is
    data[38:46] = (2**40).to_bytes(8, "little")
    path.write_text(f"untrusted comment: x\n{base64.b64encode(data).decode()}\n")
    with pytest.raises(InputError, match="bytes of memory"):
        minisign.read_secret_key(path, "open sesame")
    for text in ("", "RWxx", str(path)):
        with pytest.raises(InputError, match="public key"):
            minisign.read_public_key(text)


def test_minisign_verifies_what_is_signed_here(published: str, key: minisign.SecretKey, program: Run, tmp_path: Path) -> None:
    pull(verify.parse_reference(published), tmp_path / "pulled")
    sign_directory(tmp_path / "pulled", key=key)
    done = program("-V", "-P", key.public, "-m", "SHA256SUMS", cwd=tmp_path / "pulled")
    assert done.returncode == 0 and "quantize release sha256:" in done.stdout, done
    (tmp_path / "pulled" / "SHA256SUMS").write_text("changed")
    assert program("-V", "-P", key.public, "-m", "SHA256SUMS", cwd=tmp_path / "pulled").returncode != 0


def test_a_key_made_here_signs_in_minisign_and_its_signature_comes_back(
    published: str, key: minisign.SecretKey, program: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pull(verify.parse_reference(published), tmp_path / "pulled")
    done = program("-S", "-s", tmp_path / "key", "-x", "made.minisig", "-m", tmp_path / "pulled" / "SHA256SUMS", cwd=tmp_path)
    assert done.returncode == 0, done
    assert sign.main([published.partition("@")[0], "--signature", str(tmp_path / "made.minisig")]) == 0
    assert verify.main([published.partition("@")[0], "--public-key", str(tmp_path / "key.pub")]) == 0
    assert sign.main([str(tmp_path / "pulled"), "--signature", str(tmp_path / "none")]) == 2


# minisign's own passwords cost a GiB of memory and several seconds.
@pytest.mark.parametrize("password", [None, pytest.param("open sesame", marks=pytest.mark.slow)])
def test_a_key_made_by_minisign_signs_here(password: str | None, program: Run, tmp_path: Path) -> None:
    arguments = ["-G", "-f", "-p", "k.pub", "-s", "k", *([] if password else ["-W"])]
    done = program(*arguments, cwd=tmp_path, input=f"{password}\n{password}\n" if password else None)
    if password and done.returncode:
        pytest.skip("this minisign reads passwords from a terminal only")
    secret = minisign.read_secret_key(tmp_path / "k", password)
    assert secret.public == minisign.read_public_key(str(tmp_path / "k.pub"))
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "file.minisig").write_bytes(minisign.sign(secret, b"content", "c"))
    assert program("-V", "-p", "k.pub", "-m", "file", cwd=tmp_path).returncode == 0


def test_the_signature_of_the_format_without_hashing(key: minisign.SecretKey) -> None:
    """What ``minisign -l`` writes: Ed25519 over the file itself."""
    first = key.sign(b"data")
    both = key.sign(first + b"old")
    lines = ["untrusted comment: x", base64.b64encode(b"Ed" + key.key_id + first).decode()]
    text = "\n".join([*lines, "trusted comment: old", base64.b64encode(both).decode(), ""])
    assert minisign.check(key.public, b"data", text.encode(), "x") == "old"


def test_an_artifact_is_published_with_its_signature(
    artifact: Path, tmp_path: Path, key: minisign.SecretKey, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = f"local:{tmp_path / 'signed'}//tiny"
    assert publish_command.main([str(artifact), reference, "--key", str(tmp_path / "none")]) == 2
    assert "is no minisign secret key" in capsys.readouterr().err and not (tmp_path / "signed").exists()
    assert publish_command.main([str(artifact), reference, "--key", str(tmp_path / "key")]) == 0
    assert verify.main([reference, "--public-key", str(tmp_path / "key.pub")]) == 0
