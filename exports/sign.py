"""``python -m exports.sign DIR|REF --key FILE``: sign a release as minisign does, in a pulled directory or in its registry.

``python -m exports.sign --generate FILE`` makes a key pair: FILE, kept off the network, and FILE.pub, for everyone to know.
On a machine without this project, ``minisign -S -m SHA256SUMS`` makes a signature that ``--signature`` brings in.
"""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from pathlib import Path

from exports import minisign
from exports.command import EXIT_CODES, REFERENCE, carry_out
from exports.registry.names import is_reference, parse_reference
from exports.signing import sign_directory, sign_published
from quantize.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit codes as in :mod:`exports.command`."""
    parser = argparse.ArgumentParser(prog="python -m exports.sign", description=__doc__.split("\n")[0], epilog=EXIT_CODES)
    parser.add_argument("what", metavar="DIR|REF", nargs="?", help=f"a pulled release's directory, or {REFERENCE}")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--key", type=Path, metavar="FILE", help="the secret key (its password: MINISIGN_PASSWORD, or asked for)")
    how.add_argument("--signature", type=Path, metavar="FILE", help="the signature of SHA256SUMS, made elsewhere")
    how.add_argument("--generate", type=Path, metavar="FILE", help="make a key pair: FILE and FILE.pub")
    parser.add_argument("--no-password", action="store_true", help="with --generate: the secret key is not encrypted")
    options = parser.parse_args(arguments)

    def action() -> int:
        if options.generate is not None:
            password = None if options.no_password else _password("password of the new key: ", options.generate)
            public = minisign.generate(options.generate, password)
            print(f"{options.generate}: the secret key\n{options.generate}.pub: the public key, {public}")
            return 0
        if options.what is None:
            raise InputError("nothing to sign; name a pulled release's directory, or its reference")
        key = secret_key(options.key) if options.key else None
        signature = _read(options.signature) if options.signature else None
        if is_reference(options.what):
            reference, _ = sign_published(parse_reference(options.what), key=key, signature=signature)
            print(f"{reference}: signed")
        else:
            release = sign_directory(Path(options.what), key=key, signature=signature)
            print(f"{options.what}: signed, now {release.digest}")
        return 0

    return carry_out(action)


def secret_key(path: Path) -> minisign.SecretKey:
    """A secret key; its password is that of ``MINISIGN_PASSWORD``, or asked for in a terminal.

    Raises:
        InputError: no secret key's file, or the wrong password.
    """
    try:
        return minisign.read_secret_key(path, os.environ.get("MINISIGN_PASSWORD") or None)
    except InputError as error:
        if "under a password" not in str(error) or not sys.stdin.isatty():
            raise
    return minisign.read_secret_key(path, getpass.getpass(f"password of {path}: "))


def _password(prompt: str, path: Path) -> str:
    password = os.environ.get("MINISIGN_PASSWORD") or (getpass.getpass(prompt) if sys.stdin.isatty() else "")
    if not password:
        raise InputError(f"{path} needs a password; set MINISIGN_PASSWORD, or say --no-password")
    return password


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"--signature {path} cannot be read; give the .minisig file that minisign wrote") from error


if __name__ == "__main__":
    sys.exit(main())
