"""The flag `--bundle` of the commands that measure the example model by default."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from pathlib import Path

from runtime.cli.flags import BUNDLE_VARIABLE

EXAMPLE_BUNDLE = Path("examples/anydoor-small")


def add_bundle_option(command: ArgumentParser) -> None:
    """Add `--bundle DIR`: by default the one that ANYDOOR_BUNDLE names, or else the example."""
    command.add_argument(
        "--bundle",
        type=Path,
        default=Path(os.environ.get(BUNDLE_VARIABLE, EXAMPLE_BUNDLE)),
        metavar="DIR",
        help=f"default: ${BUNDLE_VARIABLE}, or else {EXAMPLE_BUNDLE}",
    )
