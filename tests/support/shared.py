"""What tests make once and share, in build/: whoever comes first makes it while the others wait."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.support.fingerprint import fingerprint

ROOT = Path(__file__).parents[2]


def shared_folder() -> Path:
    """A folder for this version of the code."""
    return ROOT / "build" / "tests" / fingerprint()


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Lets one of the parallel test processes build while the others wait."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def traced_once() -> Iterator[None]:
    """Lets bundles share the graphs that are of the same weights, and differ at most after they are rewritten
    for a target: tracing them takes most of a build's time."""
    from export import onnx_graph

    traced: dict[str, Any] = {}
    trace = onnx_graph.trace

    def once(module: Any, spec: Any, opset: int) -> Any:
        digest = hashlib.sha256(repr(spec).encode())
        for name, weight in module.state_dict().items():
            digest.update(f"{name} {weight.dtype}".encode() + weight.numpy().tobytes())
        key = digest.hexdigest()
        if key not in traced:
            traced[key] = trace(module, spec, opset)
        program = copy.copy(traced[key])
        program.model = program.model.clone()
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "trace", once)
        yield
