"""Signatures of bundles: Ed25519 (RFC 8032) over manifest.json, which has the hash of every other file.

The signature is 64 bytes in a file beside it, and keys are PEM files: what OpenSSL's `pkeyutl` and `genpkey`
read and write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.errors import BackendError, BundleError
from engines.files import write_bytes

SIGNATURE = "manifest.json.sig"

NEW_KEY = "openssl genpkey -algorithm ed25519 -out private.pem"
PUBLIC_KEY = "openssl pkey -in private.pem -pubout -out public.pem"


def sign(manifest: Path, private_key: Path) -> Path:
    """Writes the signature of a manifest beside it; returns its path.

    Raises:
        BackendError: cryptography is not installed.
        BundleError: the key cannot be used, or the signature cannot be written.
    """
    serialization, ed25519 = _library()
    pem = _read(private_key)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except Exception as error:  # ValueError, TypeError for a password, and classes of the library's own
        raise BundleError(
            f"'{private_key}' is not a private key in PEM without a password; make one with: {NEW_KEY}"
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise BundleError(f"'{private_key}' is not an Ed25519 key; make one with: {NEW_KEY}")
    place = manifest.with_name(SIGNATURE)
    try:
        write_bytes(place, key.sign(manifest.read_bytes()))
    except OSError as error:
        raise BundleError(f"cannot write '{place}': {error.strerror}") from error
    return place


def check(content: bytes, signature: Path, trusted_key: Path) -> None:
    """Checks that a manifest is signed with the private key of a public one.

    Args:
        content: of manifest.json.
        signature: the file with its signature.
        trusted_key: PEM file with the public key.

    Raises:
        BackendError: cryptography is not installed.
        BundleError: the signature is missing or is not that of the key, or the key cannot be used.
    """
    serialization, ed25519 = _library()
    pem = _read(trusted_key)
    try:
        key = serialization.load_pem_public_key(pem)
    except Exception as error:  # ValueError, and classes of the library's own
        raise BundleError(
            f"'{trusted_key}' is not a public key in PEM; make it with: {PUBLIC_KEY}"
        ) from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise BundleError(f"'{trusted_key}' is not an Ed25519 key; make one with: {NEW_KEY}")
    if not signature.is_file():
        raise BundleError(
            f"the bundle at '{signature.parent}' is not signed, and a signature is required: sign it with "
            f"'anydoor sign {signature.parent} --key private.pem'"
        )
    try:
        key.verify(_read(signature), content)
    except Exception as error:  # InvalidSignature, which says nothing
        raise BundleError(
            f"the bundle at '{signature.parent}' is not signed by the owner of '{trusted_key}', or was "
            "changed since it was signed"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read '{path}': {error.strerror}") from error


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise BackendError(
            "signatures need the package 'cryptography'; install it with: pip install '.[sign]'"
        ) from error
    return serialization, ed25519
