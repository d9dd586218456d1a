"""Fills a skeleton with seeded noise in place of weights, where it runs. Needs NumPy only.

What the network draws means nothing.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import BundleError
from engines.files import replacing, write_text
from engines.manifest import MANIFEST, FileRecord, GraphRecord, Manifest, read_manifest
from engines.verified import FileState

RECIPE = "noise.json"
"""File of a skeleton: graph -> its weights, each a `NoisyWeight`."""

_PERIOD = 1_000_003
"""Numbers that are drawn and then repeated; a prime, so that no two rows of a weight are the same."""


@dataclass(frozen=True)
class NoisyWeight:
    """A weight that is left out: where it belongs in the file, and how its values are distributed."""

    name: str
    offset: int
    """Bytes before it."""
    count: int
    """Of values."""
    dtype: str
    mean: float
    deviation: float


def write_recipe(bundle: Path, weights: Mapping[str, Sequence[NoisyWeight]]) -> None:
    """Writes what `fill` needs.

    Args:
        bundle: a directory.
        weights: graph -> its weights.
    """
    content = {graph: [list(asdict(weight).values()) for weight in of] for graph, of in weights.items()}
    write_text(bundle / RECIPE, json.dumps(content) + "\n")


def is_filled(bundle: Path) -> bool:
    """Returns whether all files that the manifest of a bundle names are there and have their hashes."""
    records = [file for graph in read_manifest(bundle / MANIFEST).graphs.values() for file in graph.files]
    return all(record.sha256 and (bundle / record.path).is_file() for record in records)


def fill(bundle: Path, seed: int = 0) -> Manifest:
    """Writes the missing weights of a skeleton, and completes its manifest.

    Args:
        bundle: a directory that `build_skeleton` wrote.
        seed: of the noise. A weight depends on it and on the weight's name alone.

    Raises:
        BundleError: the directory is no skeleton.
    """
    manifest = read_manifest(bundle / MANIFEST)
    try:
        recipe = json.loads((bundle / RECIPE).read_text("utf-8"))
        weights = {graph: [NoisyWeight(*weight) for weight in recipe[graph]] for graph in manifest.graphs}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BundleError(
            f"'{bundle}' is no skeleton: its {RECIPE} is missing or damaged; make it again with "
            "'anydoor build --skeleton'"
        ) from error
    noise = np.random.default_rng(seed).standard_normal(_PERIOD, dtype=np.float32)
    graphs = {
        name: _fill_graph(bundle, record, weights[name], noise) for name, record in manifest.graphs.items()
    }
    manifest = replace(manifest, graphs=graphs)
    write_text(bundle / MANIFEST, manifest.to_json())
    return manifest


def _fill_graph(
    bundle: Path, record: GraphRecord, weights: Sequence[NoisyWeight], noise: NDArray[np.float32]
) -> GraphRecord:
    graph_file, data_file = record.files
    path = bundle / data_file.path
    digest = hashlib.sha256()
    with replacing(path) as partial, partial.open("wb") as file:
        for weight in sorted(weights, key=lambda weight: weight.offset):
            assert weight.offset == file.tell()
            for piece in _pieces(weight, noise):
                file.write(piece.data)
                digest.update(piece.data)
    data = FileRecord(data_file.path, path.stat().st_size, digest.hexdigest())
    # the hash was computed of what was written: the engine need not read it again
    FileState.of(path, data.sha256).remember()
    return replace(record, files=(graph_file, data))


def _pieces(weight: NoisyWeight, noise: NDArray[np.float32]) -> list[NDArray[Any]]:
    """Returns the values of a weight: a stretch of noise, and its beginning as often as is needed."""
    start = zlib.crc32(weight.name.encode()) % _PERIOD
    stretch = np.roll(noise, -start)[: weight.count]
    scaled = stretch * np.float32(weight.deviation) + np.float32(weight.mean)
    values = scaled.astype(weight.dtype)
    whole, rest = divmod(weight.count, len(values))
    return [values] * whole + ([values[:rest]] if rest else [])
