"""What parity.py and precision.py are asked for alike: recorded cases, and the network that made them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from benchmarks.golden import GoldenRun, lacks_inputs, read_case
from engines.bundle import MANIFEST, read_manifest, sha256
from engines.errors import AnyDoorError, BundleError

BUNDLES = Path("build/parity")


def add_case_options(command: argparse.ArgumentParser) -> None:
    """Adds the cases, and the options for reading them and for building the network's bundle."""
    command.add_argument("cases", type=Path, nargs="+", metavar="CASE.npz")
    command.add_argument(
        "--inputs",
        type=Path,
        metavar="CASE.npz",
        help="lends pictures to cases without (default: public/case0.npz)",
    )
    command.add_argument("--resolution", type=int, default=512, metavar="PX")
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    command.add_argument("--unet-head-width", type=int, metavar="N", help="if the checkpoint does not tell")
    command.add_argument("--dino-heads", type=int, metavar="N", help="if the checkpoint does not tell")


def read_runs(case: Path, options: argparse.Namespace) -> list[GoldenRun]:
    """The runs of a case, with pictures lent to one that has none.

    Raises:
        AnyDoorError: it is not a case, or nothing lends it pictures.
    """
    return read_case(case, (options.inputs or find_donor(case)) if lacks_inputs(case) else None)


def bundle_of(options: argparse.Namespace, precision: str) -> Path:
    """The bundle that the options ask for; see `find_or_build`."""
    heads = options.unet_head_width, options.dino_heads
    return find_or_build(options.checkpoint, precision, options.resolution, *heads)


def find_or_build(
    checkpoint: Path,
    precision: str = "fp32",
    resolution: int = 512,
    unet_head_width: int | None = None,
    dino_heads: int | None = None,
) -> Path:
    """A bundle of a checkpoint: the one that an earlier call left, or a new one.

    Raises:
        AnyDoorError: the checkpoint cannot be built.
    """
    if not checkpoint.is_file():
        raise AnyDoorError(f"there is no checkpoint at '{checkpoint}'")
    with tqdm(
        total=checkpoint.stat().st_size, unit="B", unit_scale=True, desc="hashing the checkpoint", leave=False
    ) as bar:
        digest = sha256(checkpoint, bar.update)
    bundle = BUNDLES / f"{checkpoint.stem}-{digest[:12]}-{precision}-{resolution}"
    try:
        if read_manifest(bundle / MANIFEST).checkpoint["sha256"] == digest:
            print(f"bundle: {bundle} (from an earlier run)", file=sys.stderr)
            return bundle
    except BundleError:
        pass
    from export.build_engines import BuildOptions, build_bundle
    from training.network.checkpoint import read_checkpoint

    build = BuildOptions(precision=precision, resolution=resolution)
    build_bundle(read_checkpoint(checkpoint, unet_head_width, dino_heads), bundle, build)
    return bundle


def find_donor(case: Path) -> Path:
    """The case whose pictures stand in for what another lacks: public/case0.npz of the same collection.

    Raises:
        AnyDoorError: it is not found.
    """
    bases = [*case.resolve().parents, *Path.cwd().resolve().parents, Path.cwd()]
    for base in bases:
        for folder in ("", "public", "golden/public", "shared/golden/public"):
            found = base / folder / "case0.npz"
            if found.is_file() and found.resolve() != case.resolve():
                return found
    raise AnyDoorError(f"'{case}' holds no pictures: say which case lends its inputs with --inputs CASE0.npz")
