"""The bundles that card.py needs: made where PyTorch is, filled with noise where they are measured."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.support.card.parity import BUNDLES
from benchmarks.support.card.task import NETWORKS
from benchmarks.support.fingerprint import fingerprint
from benchmarks.support.graph_costs import count_bundle
from benchmarks.support.graphs import GRAPHS, ROW_INPUTS
from benchmarks.support.networks import architecture_of
from benchmarks.support.results import read_results
from engines.bundle import Bundle
from engines.errors import AnyDoorError
from engines.manifest import ANY_TARGET, MANIFEST, read_manifest
from export.noise import fill, is_filled
from training.network.architecture import Architecture

_FULL, _TINY = NETWORKS["cuda"], NETWORKS["cpu"]

_TINY_RESOLUTION = 64
_COUNTED = "latency-full-cpu"
"""Results with the operations of the full-size graphs."""


def needed(device: str) -> list[str]:
    """Return the names of all bundles that are measured on a device."""
    return list(dict.fromkeys([NETWORKS[device], _TINY, *BUNDLES[device]]))


def missing(folder: Path, device: str) -> list[str]:
    """Return the names of those that are not in a folder."""
    return [name for name in needed(device) if not (folder / name / MANIFEST).is_file()]


def outdated(folder: Path, device: str) -> list[str]:
    """Return the names of those that are missing, or that other code than this made."""
    return [name for name in needed(device) if made_by(folder / name) != fingerprint()]


def made_by(bundle: Path) -> str:
    """Return the fingerprint of the code that made a bundle or skeleton; empty if that is not known."""
    record = _record(bundle)
    return record.read_text("ascii") if record.is_file() and (bundle / MANIFEST).is_file() else ""


def _record(bundle: Path) -> Path:
    return bundle.with_name(f"{bundle.name}.fingerprint")


def make(folder: Path, name: str) -> None:
    """Make a bundle or skeleton anew, and note the fingerprint of the code beside it.

    Args:
        folder: where to.
        name: one of `needed`.

    Raises:
        ModuleNotFoundError: the export extras are not installed.
    """
    import torch

    from benchmarks.seeded import SMALL, TINY, seeded_checkpoint
    from export.build import build_bundle
    from export.options import BuildOptions
    from export.skeleton import build_skeleton
    from export.systems import open_source, published_source
    from export.systems.anydoor import AnyDoorSource

    if name == _FULL:
        options = BuildOptions(precision="fp16", targets=("cuda",))
        build_skeleton(published_source(options.precision), folder / name, options)
    elif name == _TINY:
        source = AnyDoorSource.without_weights(TINY, torch.float32)
        build_skeleton(source, folder / name, BuildOptions(resolution=_TINY_RESOLUTION))
    else:
        target, precision = name.split("-")
        options = BuildOptions(precision=precision, targets=(target,))
        with tempfile.TemporaryDirectory() as temporary:
            # the weights that the recordings were made with
            checkpoint = Path(temporary) / "small.safetensors"
            seeded_checkpoint(checkpoint, SMALL, seed=0)
            build_bundle(open_source(checkpoint), folder / name, options)
    _record(folder / name).write_text(fingerprint(), "ascii")


def fill_skeletons(folder: Path, device: str) -> None:
    """Give weights to the skeletons that have none yet."""
    for name in {NETWORKS[device], _TINY} - set(missing(folder, device)):
        if not is_filled(folder / name):
            fill(folder / name)


def flops_per_row(bundle: Path) -> dict[str, float]:
    """Return the operations of matrix products that a row of each graph takes.

    They are counted in the graphs. Those of a skeleton for cards have operators whose shapes cannot be
    inferred: of the full size, the counts in the results of latency.py are taken.

    Raises:
        AnyDoorError: they are not known.
        ModuleNotFoundError: they have to be counted, and `onnx` is not installed.
    """
    manifest = read_manifest(bundle / MANIFEST)
    if manifest.target == ANY_TARGET:
        flops = {name: cost.matrix_flops for name, cost in count_bundle(Bundle.open(bundle)).items()}
    elif architecture_of(manifest) == Architecture() and manifest.resolution == 512:
        counted = read_results(_COUNTED)["roofline"]["graphs"]
        flops = {each["graph"]: each["matrix_flops"] for each in counted}
    else:
        raise AnyDoorError(f"the operations of '{bundle}' are not known")
    # counted for a picture with guidance, which is two rows
    return {graph: flops[graph] / (2 if graph in ROW_INPUTS else 1) for graph in GRAPHS}
