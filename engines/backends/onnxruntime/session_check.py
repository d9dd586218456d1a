"""Compares sessions with the signatures of their graphs, on a CPU and on a card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engines.graph_check import LoadedTensor, check_loaded
from engines.spec import GraphSpec

_DTYPES = {"tensor(float)": "float32"} | {
    f"tensor({dtype})": dtype for dtype in ("float16", "int32", "uint8")
}
"""The library's name of a type -> NumPy's."""


def check_session(spec: GraphSpec, session: Any) -> None:
    """Compares a session's inputs and outputs with a signature.

    Raises:
        BundleError: they differ.
    """
    check_loaded(spec, _described(session.get_inputs()), _described(session.get_outputs()))


def _described(tensors: Sequence[Any]) -> list[LoadedTensor]:
    return [
        LoadedTensor(
            of.name,
            _DTYPES.get(of.type, of.type),
            tuple(size if isinstance(size, int) else None for size in of.shape),
        )
        for of in tensors
    ]
