"""Signatures of minisign's format, made and checked without it: Ed25519 over the BLAKE2b-512 hash of a file.

The format is that of https://jedisct1.github.io/minisign/ ("Signature format", "Secret key format"). Keys and signatures made
here work in minisign 0.10 and later, and its in here. Secret keys under a password are read (scrypt, as libsodium chooses its
parameters) and made; ``MINISIGN_PASSWORD`` has the password where nobody can be asked.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exports.registry.base import Damaged
from quantize.atomic import atomic_path
from quantize.errors import InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SUFFIX = ".minisig"
_OPSLIMIT, _MEMLIMIT = 2**20, 2**25  # libsodium's "interactive": 32 MiB, a fraction of a second
_MOST_MEMORY = 2**31
_UNTRUSTED, _TRUSTED = "untrusted comment: ", "trusted comment: "


@dataclass(frozen=True)
class PublicKey:
    """``key_id``: 8 bytes; ``key``: the 32 bytes of an Ed25519 public key."""

    key_id: bytes
    key: bytes

    def __str__(self) -> str:
        return base64.b64encode(b"Ed" + self.key_id + self.key).decode()

    @property
    def name(self) -> str:
        """The key id as minisign prints it."""
        return self.key_id[::-1].hex().upper()


@dataclass(frozen=True)
class SecretKey:
    """``key_id``: 8 bytes; ``seed``: the 32 bytes of an Ed25519 private key, never printed."""

    key_id: bytes
    seed: bytes

    def __repr__(self) -> str:
        return f"SecretKey({self.key_id.hex()})"

    @property
    def public(self) -> PublicKey:
        """The public key that belongs to it."""
        return PublicKey(self.key_id, self._private().public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        """64 bytes."""
        return self._private().sign(message)

    def _private(self) -> Ed25519PrivateKey:
        key: Ed25519PrivateKey = _ed25519().Ed25519PrivateKey.from_private_bytes(self.seed)
        return key


def read_public_key(text: str) -> PublicKey:
    """A public key from its base64 form (``RW...``) or from the file that has it in its last line.

    Raises:
        InputError: it is neither.
    """
    path = Path(text)
    line = text
    try:
        if path.is_file():
            line = path.read_text(encoding="utf-8").strip().splitlines()[-1]
        data = base64.b64decode(line.strip(), validate=True)
    except (OSError, ValueError, IndexError):
        data = b""
    if len(data) != 42 or data[:2] != b"Ed":
        raise InputError(f"{text[:120]!r} is no minisign public key; give its file, or the line in it that starts with RW")
    return PublicKey(data[2:10], data[10:])


def read_secret_key(path: Path, password: str | None = None) -> SecretKey:
    """A secret key; ``password``: where it is under one.

    Raises:
        InputError: no secret key's file, a wrong password or none, or one that asks for more than 2 GiB of memory.
    """
    try:
        data = base64.b64decode(path.read_text(encoding="utf-8").strip().splitlines()[-1], validate=True)
    except (OSError, ValueError, IndexError) as error:
        raise InputError(
            f"{path} is no minisign secret key; make one with `python -m exports.sign --generate {path}`"
        ) from error
    if len(data) != 158 or data[:2] != b"Ed" or data[2:4] not in (b"Sc", b"\0\0") or data[4:6] != b"B2":
        raise InputError(
            f"{path} is no minisign secret key of Ed25519; make one with `python -m exports.sign --generate {path}`"
        )
    salt, opslimit, memlimit = data[6:38], int.from_bytes(data[38:46], "little"), int.from_bytes(data[46:54], "little")
    held = data[54:]
    if data[2:4] == b"Sc":
        if password is None:
            raise InputError(f"{path} is under a password; set MINISIGN_PASSWORD, or run this in a terminal")
        held = _mask(held, password, salt, opslimit, memlimit)
    key_id, seed, public, checksum = held[:8], held[8:40], held[40:72], held[72:]
    encrypted, key = data[2:4] == b"Sc", SecretKey(key_id, seed)
    # minisign writes no checksum into a key without a password; that its two halves belong together shows damage as well.
    if (encrypted and not hmac.compare_digest(checksum, _checksum(key_id, seed, public))) or key.public.key != public:
        raise InputError(f"{path}: {'the password is wrong, or ' if encrypted else ''}the file is damaged")
    return key


def generate(path: Path, password: str | None) -> PublicKey:
    """Make a key pair: the secret key in ``path`` (mode 600), the public key beside it with the suffix ``.pub``.

    Raises:
        InputError: one of the files exists.
    """
    public_path = path.with_name(f"{path.name}.pub")
    for each in (path, public_path):
        if each.exists():
            raise InputError(f"{each} exists; keys are not overwritten, choose another name")
    key = SecretKey(secrets.token_bytes(8), secrets.token_bytes(32))
    public = key.public
    held = key.key_id + key.seed + public.key + _checksum(key.key_id, key.seed, public.key)
    if password is None:
        data = b"Ed\0\0B2" + bytes(48) + held
    else:
        salt = secrets.token_bytes(32)
        limits = _OPSLIMIT.to_bytes(8, "little") + _MEMLIMIT.to_bytes(8, "little")
        data = b"EdScB2" + salt + limits + _mask(held, password, salt, _OPSLIMIT, _MEMLIMIT)
    for target, kind, content in (
        (path, "secret key", base64.b64encode(data).decode()),
        (public_path, "public key", str(public)),
    ):
        with atomic_path(target) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if target == path else 0o644)
            with os.fdopen(descriptor, "w", encoding="ascii") as stream:
                stream.write(f"{_UNTRUSTED}minisign {kind} {public.name}\n{content}\n")
    return public


def sign(key: SecretKey, data: bytes, comment: str) -> bytes:
    """The signature file of ``data``; ``comment``, one line, is signed too. The same input gives the same bytes."""
    signature = key.sign(hashlib.blake2b(data).digest())
    both = key.sign(signature + comment.encode())
    lines = [
        f"{_UNTRUSTED}signature of a quantize release, key {key.public.name}",
        base64.b64encode(b"ED" + key.key_id + signature).decode(),
        f"{_TRUSTED}{comment}",
        base64.b64encode(both).decode(),
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def check(key: PublicKey, data: bytes, signature: bytes, name: str) -> str:
    """The trusted comment of a signature file, where it is this key's signature of ``data``; ``name``: of the signature file.

    Raises:
        Damaged: it is not.
    """
    try:
        lines = signature.decode("utf-8").splitlines()
        first, second = base64.b64decode(lines[1], validate=True), base64.b64decode(lines[3], validate=True)
        comment = lines[2].removeprefix(_TRUSTED)
        whole = len(first) == 74 and len(second) == 64 and lines[2] != comment
    except (ValueError, binascii.Error, IndexError):
        whole = False
    if not whole or first[:2] not in (b"ED", b"Ed"):
        raise Damaged(f"{name}: no signature of minisign's format")
    if first[2:10] != key.key_id:
        raise Damaged(f"{name}: made with another key ({first[2:10][::-1].hex().upper()}), not with {key.name}")
    message = hashlib.blake2b(data).digest() if first[:2] == b"ED" else data
    if not _is_valid(key, first[10:], message) or not _is_valid(key, second, first[10:] + comment.encode()):
        raise Damaged(f"{name}: the signature is not valid: files or comment were changed after signing")
    return comment


def _is_valid(key: PublicKey, signature: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        _ed25519().Ed25519PublicKey.from_public_bytes(key.key).verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise InputError(
            "signatures need the package cryptography; install it with `pip install 'quantize[publish]'`"
        ) from error
    return ed25519


def _checksum(key_id: bytes, seed: bytes, public: bytes) -> bytes:
    return hashlib.blake2b(b"Ed" + key_id + seed + public, digest_size=32).digest()


def _mask(held: bytes, password: str, salt: bytes, opslimit: int, memlimit: int) -> bytes:
    """``held`` xor scrypt's output: encrypts and decrypts. Parameters as ``crypto_pwhash_scryptsalsa208sha256`` picks them."""
    r, opslimit = 8, max(opslimit, 32768)
    if opslimit < memlimit // 32:
        p, most = 1, opslimit // (r * 4)
        log_n = _log(most)
    else:
        log_n = _log(memlimit // (r * 128))
        p = min(opslimit // 4 // 2**log_n, 0x3FFFFFFF) // r
    memory = 128 * r * (2**log_n + p + 2)
    if memory > _MOST_MEMORY or p < 1:
        raise InputError(f"the secret key's password asks for {memory:,} bytes of memory; at most {_MOST_MEMORY:,} are used")
    stream = hashlib.scrypt(password.encode(), salt=salt, n=2**log_n, r=r, p=p, maxmem=memory + 2**20, dklen=len(held))
    return bytes(a ^ b for a, b in zip(held, stream, strict=True))


def _log(most: int) -> int:
    return next((n for n in range(1, 63) if 2**n > most // 2), 62)
