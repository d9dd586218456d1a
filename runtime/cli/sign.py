"""Implements `anydoor sign`: signs a bundle, for machines that run signed bundles only."""

from __future__ import annotations

import argparse
from pathlib import Path

from runtime.cli import missing_package

NAME = "sign"
HELP = "Sign a bundle, so that others can verify who built it"
EXAMPLES = """
anydoor sign build/engines/anydoor --key private.pem
openssl genpkey -algorithm ed25519 -out private.pem
openssl pkey -in private.pem -pubout -out public.pem
anydoor doctor build/engines/anydoor --trusted-key public.pem
anydoor serve --bundle build/engines/anydoor --require-signature --trusted-key public.pem
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory of the bundle")
    parser.add_argument(
        "--key", type=Path, required=True, metavar="FILE", help="PEM file with an Ed25519 private key"
    )


def run(options: argparse.Namespace) -> int:
    """Verifies all hashes, then writes the signature and prints its path.

    Raises:
        AnyDoorError: the bundle is damaged, or the key cannot be used.
    """
    try:
        from engines.bundle import Bundle
    except ModuleNotFoundError as error:
        raise missing_package(error, "cpu") from error
    from engines.manifest import MANIFEST
    from engines.signature import sign

    bundle = Bundle.open(options.bundle)
    bundle.verify_all()
    print(f"signature: {sign(bundle.path / MANIFEST, options.key)}")
    return 0
