"""The options that parity.py and precision.py share: recorded cases, and the network that made them."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.support.cached_models import find_or_build
from benchmarks.support.golden import GoldenRun, lacks_inputs, read_case
from engines.errors import AnyDoorError


def add_case_options(command: argparse.ArgumentParser) -> None:
    """Add the cases, and the options for reading them and for building the network's bundle."""
    command.add_argument("cases", type=Path, nargs="+", metavar="CASE.npz")
    command.add_argument(
        "--inputs",
        type=Path,
        metavar="CASE.npz",
        help="where cases without pictures take them from (default: public/case0.npz)",
    )
    command.add_argument("--resolution", type=int, default=512, metavar="PX")
    command.add_argument("--unet-head-width", type=int, metavar="N", help="if the checkpoint does not say")
    command.add_argument("--dino-heads", type=int, metavar="N", help="if the checkpoint does not say")


def read_runs(case: Path, options: argparse.Namespace) -> list[GoldenRun]:
    """Read the runs of a case; one without pictures takes those of another.

    Raises:
        AnyDoorError: the file is not a case, or no case with pictures is found.
    """
    return read_case(case, (options.inputs or find_donor(case)) if lacks_inputs(case) else None)


def bundle_of(options: argparse.Namespace, precision: str) -> Path:
    """Return the bundle that the options ask for; see `find_or_build`."""
    heads = options.unet_head_width, options.dino_heads
    return find_or_build(options.checkpoint, precision, options.resolution, *heads)


def find_donor(case: Path) -> Path:
    """Find the case whose pictures another one uses: public/case0.npz of the same collection.

    Raises:
        AnyDoorError: it is not found.
    """
    bases = [*case.resolve().parents, *Path.cwd().resolve().parents, Path.cwd()]
    for base in bases:
        for folder in ("", "public", "golden/public", "shared/golden/public"):
            found = base / folder / "case0.npz"
            if found.is_file() and found.resolve() != case.resolve():
                return found
    raise AnyDoorError(f"'{case}' holds no pictures: name a case that has some with --inputs CASE0.npz")
