"""Defines the exporter's interface of a system: its graphs, with roles and signatures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engines.bundle import sha256
from engines.engine import Array, Engine
from engines.spec import GraphSpec
from export.output import printable
from training.network.tokenizer_files import TokenizerFiles

Size = tuple[int, int]
"""(height, width) of a picture, in pixels."""

Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]
"""Makes an example input: (random numbers, shape) -> array."""


@dataclass(frozen=True)
class GraphExport:
    """A graph to be exported."""

    spec: GraphSpec
    load: Callable[[torch.dtype], nn.Module]
    """Builds the module and loads its weights as numbers of a dtype; arguments in the order of the inputs."""
    examples: Mapping[str, Draw] = field(default_factory=dict)
    """Input -> how to draw it, where normal random numbers make no sense."""


class ExportSource(Protocol):
    """A checkpoint of one system. `export.systems.open_source` finds the system."""

    system: str
    """Name of the system, as in the manifest."""
    path: Path
    """The checkpoint."""

    @property
    def description(self) -> str:
        """Describes the checkpoint in one sentence."""

    dtype: torch.dtype
    """Dtype of the stored weights."""
    defaults: Mapping[str, Any]
    """Parameters that the model was trained for."""
    size: Size | None
    """Size of the pictures that it was trained on, if the checkpoint says so."""
    architecture: Mapping[str, Any]
    """Sizes of the network, for information."""
    dimensions: Mapping[str, int]
    """Variable dimension -> its size for one sample with guidance."""

    @property
    def tokenizer(self) -> TokenizerFiles | None:
        """Tokenizer of its prompts; None if it takes none."""

    def record(self) -> dict[str, Any]:
        """Returns the record of the checkpoint for the manifest: see `checkpoint_record`."""

    def check_size(self, size: Size) -> None:
        """Refuses a picture size that the network cannot make.

        Raises:
            AnyDoorError: says which sizes it can make.
        """

    def graphs(self, size: Size, precision: str) -> Sequence[GraphExport]:
        """Returns the graphs, in the order in which they are built. Loads nothing yet: one is in memory at a
        time."""

    def constants(self, engine: Engine) -> dict[str, NDArray[np.float32]]:
        """Returns name -> array: what belongs into constants.npz, `alphas_cumprod` (1000,) among it.

        Args:
            engine: runs the built graphs.
        """


def checkpoint_record(path: Path, files: Sequence[Path] = ()) -> dict[str, Any]:
    """Returns name and sha256 of a checkpoint. That of a folder is the hash of what sha256sum prints for its
    files.

    Args:
        path: the file, the folder, or the index of a file in shards.
        files: those that the bundle is made from, if they are not the path itself.
    """
    if tuple(files) in ((), (path,)):
        return {"file": printable(path.name), "sha256": sha256(path)}
    folder = path if path.is_dir() else path.parent
    lines = [f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    digest = hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    return {"file": printable(path.resolve().name), "sha256": digest}
