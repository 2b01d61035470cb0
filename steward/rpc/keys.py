"""Key files of a data directory: `<data>/keys`, mode 0700, each key PEM with mode 0600.

A key is made once, by whoever needs it first: written to a temporary file and linked
into place, so that two processes that start together end with the same key.
"""

import os
import secrets
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

CONTROL_KEY = "control.key"
USER_KEY = "user.key"


class KeyUnusable(Exception):
    """A key file that can't be read or is not an Ed25519 private key. Says what to do."""


def load_or_create_key(data: Path, name: str) -> Ed25519PrivateKey:
    """The Ed25519 key `<data>/keys/<name>`, made when absent.

    Raises KeyUnusable when the file is no such key or others may read it: a key that
    leaked is worse than a service that does not start.
    """
    directory = data / "keys"
    path = directory / name
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _create(path)
    except OSError as error:
        raise KeyUnusable(f"{path}: {error.strerror}; make it readable and writable") from error
    return load_key(path)


def load_key(path: Path) -> Ed25519PrivateKey:
    """The Ed25519 key in a file. Raises KeyUnusable, like `load_or_create_key`; makes nothing."""
    try:
        if path.stat().st_mode & 0o077:
            raise KeyUnusable(f"{path} may be read by others; run: chmod 600 {path}")
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise KeyUnusable(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeyUnusable(f"{path} is not a PEM private key; restore it, or move it away") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyUnusable(f"{path} is not an Ed25519 key; restore it, or move it away")
    return key


def _create(path: Path) -> None:
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass  # Somebody else was first, and theirs is the key.
    finally:
        os.unlink(temporary)
