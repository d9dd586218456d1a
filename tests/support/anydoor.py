"""AnyDoor's graphs, for tests that look at single calls, and a bundle of an earlier version."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engines.bundle import Bundle

ID_ENCODER = "id_encoder"
CONTROL = "control"
DENOISE = "denoise"
ENCODE = "encode"
DECODE = "decode"

GRAPHS = (ID_ENCODER, CONTROL, DENOISE, ENCODE, DECODE)


def without_encoder(path: Path) -> Bundle:
    """The bundle at `path`, opened as one of an earlier version, which had no graph to encode pictures."""
    bundle = Bundle.open(path)
    graphs = {name: record for name, record in bundle.manifest.graphs.items() if name != ENCODE}
    return Bundle(bundle.path, replace(bundle.manifest, graphs=graphs))
