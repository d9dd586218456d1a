"""Maps the weights of a bundle's ONNX graphs into memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle, Progress
from engines.errors import AnyDoorError
from runtime.progress_bar import ProgressBar

Weights = Mapping[str, Mapping[str, NDArray[Any]]]
"""Graph's file -> initialiser -> array of its shape: unsigned integers as wide as its values."""

_SECONDS_UNTIL_BAR = 2


def read_weights(bundle: Bundle, quiet: bool) -> Weights:
    """Maps the initialisers that lie beside the graphs into memory; smaller ones are in the graphs' files.

    Raises:
        AnyDoorError: a file is not the one that was built, or ONNX is not installed.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError as error:
        raise AnyDoorError("ONNX graphs are read with the package onnx: pip install '.[export]'") from error
    weights: dict[str, dict[str, NDArray[Any]]] = {}
    total = sum(graph.nbytes for graph in bundle.manifest.graphs.values())
    with bytes_bar(total, "verifying the bundle", quiet) as progress:
        for name, graph in bundle.manifest.graphs.items():
            bundle.verify(name, progress)
            path = bundle.path / graph.files[0].path
            try:
                initialisers = onnx.load(path, load_external_data=False).graph.initializer
                external = [tensor for tensor in initialisers if tensor.data_location == tensor.EXTERNAL]
                mapped = {each.name: _mapped(each, path.parent) for each in external}
            except (ValueError, KeyError, TypeError, OverflowError, OSError, DecodeError) as error:
                raise AnyDoorError(
                    f"the bundle at '{bundle.path}' is damaged: the weights of {path.name} cannot be read "
                    f"({error}); copy it again"
                ) from error
            weights[graph.files[0].path] = mapped
    return weights


def _mapped(tensor: Any, folder: Path) -> NDArray[Any]:
    """Maps an initialiser into memory.

    Raises:
        ValueError, KeyError, TypeError, OverflowError, OSError: its record makes no sense.
    """
    from onnx.external_data_helper import ExternalDataInfo
    from onnx.helper import tensor_dtype_to_np_dtype

    info, shape = ExternalDataInfo(tensor), tuple(tensor.dims)
    word = np.dtype(f"u{tensor_dtype_to_np_dtype(tensor.data_type).itemsize}")
    if info.length is not None and math.prod(shape) * word.itemsize != info.length:
        raise ValueError(f"'{tensor.name}' {shape} does not have the {info.length} bytes that it names")
    return np.memmap(folder / info.location, word, "r", info.offset or 0, shape)


@contextmanager
def bytes_bar(total: int, what: str, quiet: bool) -> Iterator[Progress]:
    """Shows a bar over a number of bytes where it takes long."""
    with ProgressBar(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        delay=_SECONDS_UNTIL_BAR,
        leave=False,
        disable=quiet,
    ) as bar:
        yield bar.update
