"""Defines IMPRINT's graphs: PyTorch modules and their signatures.

    reference ------------------------> [id_encoder] --> tokens
    scene ----------------------------> [encode] ------> its latent
    latent, tokens, scene, background > [denoise] -----> latent one step further
    latent ---------------------------> [decode] ------> picture

The ID encoder is DINOv2, or CLIP, with the content adapter; the other graphs are those of Stable Diffusion's
inpainting models. Checkpoints of ObjectStitch are models of this system, too: their order of the scene's
channels is a matter of the network, and the graph takes the same inputs.

Value ranges: as in `export.systems.reference`, `export.systems.scene` and `export.systems.diffusion`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engines.engine import Engine
from engines.spec import GraphSpec
from export.systems.diffusion import (
    CONDITIONS,
    DECODE,
    DENOISE,
    ENCODE,
    DecodeGraph,
    EncodeGraph,
    check_size,
    decode_spec,
    encode_spec,
    f32,
    latent_shape,
)
from export.systems.reference import EXAMPLES, ID_ENCODER, IDEncoderGraph, ReferenceSource, id_encoder_spec
from export.systems.scene import (
    DIMENSIONS,
    DenoiseGraph,
    blended_step_spec,
)
from export.systems.scene import EXAMPLES as SCENE_EXAMPLES
from export.systems.system import GraphExport, Size
from training.network.imprint import ImprintArchitecture

PARTS = {ID_ENCODER: "id_encoder", ENCODE: "vae", DENOISE: "unet", DECODE: "vae"}
"""Graph -> the part of `Imprint` whose weights it holds."""


class ImprintSource(ReferenceSource):
    """A checkpoint of IMPRINT or ObjectStitch, ready for export; see `export.systems.system.ExportSource`."""

    system = "imprint"
    dimensions = DIMENSIONS

    @property
    def _architecture(self) -> ImprintArchitecture:
        architecture = self._checkpoint.architecture
        assert isinstance(architecture, ImprintArchitecture)
        return architecture

    def check_size(self, size: Size) -> None:
        """Refuses a picture size that the network cannot halve often enough.

        Raises:
            AnyDoorError: it cannot.
        """
        check_size(self._architecture, size)

    def graphs(self, size: Size, precision: str) -> Sequence[GraphExport]:
        """Returns the four graphs, the largest first."""
        examples = {**EXAMPLES, **SCENE_EXAMPLES}
        return [
            GraphExport(spec, partial(self._load, name), examples)
            for name, spec in graph_specs(self._architecture, size, self._references).items()
        ]

    def constants(self, engine: Engine) -> dict[str, NDArray[np.float32]]:
        """Returns the noise schedule, and the tokens (1, T, D) that stand for no reference, which are
        weights."""
        tokens = self._checkpoint.unconditional_tokens.float().contiguous().numpy()
        return {"unconditional_tokens": tokens, "alphas_cumprod": self._schedule()}

    def _load(self, graph: str, dtype: torch.dtype) -> nn.Module:
        return GRAPH_MODULES[graph](self._part(PARTS[graph], dtype)).eval()


def graph_specs(architecture: ImprintArchitecture, size: Size, references: int = 1) -> dict[str, GraphSpec]:
    """Returns graph -> its signature.

    Args:
        architecture: sizes of the network.
        size: of the picture.
        references: pictures of an object that its tokens are of.
    """
    count = references * architecture.token_count
    tokens = f32("tokens", CONDITIONS, count, architecture.token_width)
    specs = (
        id_encoder_spec(architecture),
        blended_step_spec(architecture, size, tokens),
        encode_spec(latent_shape(architecture, size), size),
        decode_spec(latent_shape(architecture, size), size),
    )
    return {spec.name: spec for spec in specs}


GRAPH_MODULES: Mapping[str, type[nn.Module]] = {
    ID_ENCODER: IDEncoderGraph,
    DENOISE: DenoiseGraph,
    ENCODE: EncodeGraph,
    DECODE: DecodeGraph,
}
