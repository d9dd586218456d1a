"""Defines what systems with a reference share: checkpoints, and the graph of the ID encoder.

Value ranges: `reference` 0..1 RGB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.spec import SAMPLES, GraphSpec
from export.precision import keep_float32_layers
from export.systems.diffusion import f32, without_masks
from export.systems.system import Draw, Size, checkpoint_record
from runtime.diffusion.noise_schedule import alphas_cumprod
from training.network.architecture import REFERENCE_SIZE, Architecture
from training.network.checkpoint import Checkpoint, network_of
from training.network.checkpoint_file import weight_files
from training.network.modules import IDEncoder, ReferenceNetwork

ID_ENCODER = "id_encoder"

EXAMPLES: Mapping[str, Draw] = {"reference": lambda rng, shape: rng.random(shape, dtype=np.float32)}
"""Inputs for which normal random numbers make no sense."""


_Source = TypeVar("_Source", bound="ReferenceSource")


class ReferenceSource:
    """A checkpoint in AnyDoor's layout; each system is a class of its own.

    See `export.systems.system.ExportSource`.
    """

    tokenizer = None

    def __init__(self, checkpoint: Checkpoint, references: int = 1) -> None:
        self.path = checkpoint.path
        self.dtype = checkpoint.dtype
        self.defaults = checkpoint.defaults
        side = checkpoint.resolution
        self.size: Size | None = None if side is None else (side, side)
        self.architecture: Mapping[str, Any] = asdict(checkpoint.architecture)
        self._checkpoint = checkpoint
        self._references = references
        """Pictures of an object that its tokens are of."""

    @classmethod
    def without_weights(cls: type[_Source], architecture: Architecture, dtype: torch.dtype) -> _Source:
        """Returns a network of any size whose weights are zeros that take no memory, to export skeletons
        from."""
        with torch.device("meta"):
            shapes = network_of(architecture).official_shapes()
        zero = torch.zeros((), dtype=dtype)
        tensors = {key: zero.expand(shape) for key, shape in shapes.items()}
        return cls(Checkpoint(Path("without weights"), architecture, tensors))

    @property
    def description(self) -> str:
        """What the checkpoint is."""
        return self._checkpoint.describe()

    def record(self) -> dict[str, Any]:
        """Returns file name and sha256 of the checkpoint."""
        return checkpoint_record(self.path, weight_files(self.path))

    def _schedule(self) -> NDArray[np.float32]:
        """Returns the noise schedule (1000,) that the checkpoint was trained with."""
        stored = self._checkpoint.alphas_cumprod
        return alphas_cumprod() if stored is None else stored.float().numpy()

    def _part(self, part: str, dtype: torch.dtype) -> ReferenceNetwork:
        """Returns the network with one part, ready for export."""
        network = self._checkpoint.load_part(part, dtype)
        if dtype != torch.float32:
            keep_float32_layers(network)
        return network


def id_encoder_spec(architecture: Architecture) -> GraphSpec:
    """Returns the signature of the ID encoder."""
    return GraphSpec(
        ID_ENCODER,
        "condition",
        inputs=(f32("reference", SAMPLES, 3, REFERENCE_SIZE, REFERENCE_SIZE),),
        outputs=(f32("tokens", SAMPLES, architecture.token_count, architecture.token_width),),
    )


class IDEncoderGraph(nn.Module):
    """Reference -> ID tokens."""

    dtype: torch.dtype

    def __init__(self, model: ReferenceNetwork) -> None:
        super().__init__()
        self.model = model
        encoder = model.id_encoder
        without_masks(encoder.backbone)
        if isinstance(encoder, IDEncoder):
            # the other encoder, CLIP, was trained at this size
            encoder.fix_positions(REFERENCE_SIZE)
        self.dtype = encoder.projector.weight.dtype

    def forward(self, reference: Tensor) -> Tensor:
        """Returns (N, 3, 224, 224) in 0..1 -> (N, T, D)."""
        return self.model.encode_reference(reference.to(self.dtype)).float()
