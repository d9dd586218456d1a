"""Compares a loaded graph with the signature that the manifest promises. The hashes say that the files are
those that were built; not that the manifest describes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engines.errors import BundleError
from engines.spec import GraphSpec, TensorSpec


@dataclass(frozen=True)
class LoadedTensor:
    """An input or output, as the library that has loaded the graph describes it."""

    name: str
    dtype: str
    """As in NumPy, or the library's own name of another one."""
    shape: tuple[int | None, ...]
    """Sizes; None where they vary from call to call."""


def check_loaded(spec: GraphSpec, inputs: Iterable[LoadedTensor], outputs: Iterable[LoadedTensor]) -> None:
    """Compares names, dtypes and sizes.

    Args:
        spec: the signature.
        inputs: all inputs of the graph.
        outputs: its outputs, and maybe others.

    Raises:
        BundleError: says what differs.
    """
    for kind, promised, loaded in (("input", spec.inputs, inputs), ("output", spec.outputs, outputs)):
        found = {tensor.name: tensor for tensor in loaded}
        names = {of.stored_name for of in promised}
        missing, unknown = sorted(names - found.keys()), sorted(found.keys() - names)
        if missing:
            raise _differs(spec, f"it has no {kind} '{missing[0]}'")
        if unknown and kind == "input":
            raise _differs(spec, f"it needs the input '{unknown[0]}'")
        for of in promised:
            if not _fits(of, found[of.stored_name]):
                is_, says = _described(found[of.stored_name]), f"{of.dtype} {list(of.shape)}"
                raise _differs(spec, f"the {kind} '{of.stored_name}' is {is_}, and the manifest says {says}")


def _fits(of: TensorSpec, found: LoadedTensor) -> bool:
    if of.dtype != found.dtype or len(of.shape) != len(found.shape):
        return False
    # a size that varies by the manifest varies in the graph
    return all(size is None or size == promised for promised, size in zip(of.shape, found.shape))


def _described(found: LoadedTensor) -> str:
    return f"{found.dtype} [{', '.join('?' if size is None else str(size) for size in found.shape)}]"


def _differs(spec: GraphSpec, what: str) -> BundleError:
    return BundleError(f"the graph '{spec.name}' is not what the manifest says: {what}; rebuild the bundle")
