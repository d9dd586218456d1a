"""Defines AnyDoor's graphs: PyTorch modules and their signatures.

    reference ------------------> [id_encoder] --> tokens
    hint, timesteps, tokens ----> [control] -----> detail maps
    latent, tokens, details ----> [denoise] -----> latent one step further
    latent ---------------------> [decode] ------> picture
    picture --------------------> [encode] ------> its latent, to draw it again in tiles

Value ranges: `hint` three channels of collage in -1..1 RGB and the mask channel (-1, 0 or 1); the others as
in `export.systems.reference` and `export.systems.diffusion`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.engine import Array, Engine
from engines.errors import AnyDoorError
from engines.spec import ROWS, SAMPLES, BankSpec, GraphSpec, TensorSpec
from export.precision import BANK_DTYPES
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
    guided,
    index,
    latent_shape,
    per_sample,
    step_spec,
    weighted_sum,
)
from export.systems.reference import EXAMPLES, ID_ENCODER, IDEncoderGraph, ReferenceSource, id_encoder_spec
from export.systems.system import GraphExport, Size
from training.network.architecture import REFERENCE_SIZE, Architecture
from training.network.modules import AnyDoor

CONTROL = "control"
MAPS = "maps"
"""Dimension: sets of detail maps in a call, one per hint, timestep and set of ID tokens."""

DIMENSIONS = {SAMPLES: 1, ROWS: 2, CONDITIONS: 2, MAPS: 2}

PARTS = {ID_ENCODER: "id_encoder", CONTROL: "control", DENOISE: "unet", ENCODE: "vae", DECODE: "vae"}
"""Graph -> the part of `AnyDoor` whose weights it holds."""


class AnyDoorSource(ReferenceSource):
    """An AnyDoor checkpoint, ready for export; see `export.systems.system.ExportSource`."""

    system = "anydoor"
    dimensions: Mapping[str, int] = DIMENSIONS

    def check_size(self, size: Size) -> None:
        """Refuses a picture size that the network cannot make.

        Raises:
            AnyDoorError: its sides differ, or it cannot be halved often enough.
        """
        height, width = size
        if height != width:
            raise AnyDoorError(
                f"--resolution {width}x{height}: AnyDoor draws square pictures, so give the side alone"
            )
        check_size(self._checkpoint.architecture, size)

    def graphs(self, size: Size, precision: str) -> Sequence[GraphExport]:
        """Returns the graphs, the largest first."""
        specs = graph_specs(self._checkpoint.architecture, size[0], BANK_DTYPES[precision], self._references)
        return [GraphExport(spec, partial(self._load, name), EXAMPLES) for name, spec in specs.items()]

    def constants(self, engine: Engine) -> dict[str, NDArray[np.float32]]:
        """Returns the noise schedule, and the tokens of the black picture that stand for no reference (1, T,
        D)."""
        black: Array = np.zeros((1, 3, REFERENCE_SIZE, REFERENCE_SIZE), np.float32)
        tokens = engine.to_host(engine.run(ID_ENCODER, {"reference": black})["tokens"])
        return {"unconditional_tokens": tokens, "alphas_cumprod": self._schedule()}

    def _load(self, graph: str, dtype: torch.dtype) -> nn.Module:
        return GRAPH_MODULES[graph](self._part(PARTS[graph], dtype)).eval()


_NUMBERS = (
    f32("timestep", SAMPLES),
    f32("guidance_scale", SAMPLES),
    f32("control_scale", SAMPLES),
    f32("coefficients", SAMPLES, 3),
    index("conditional_row", SAMPLES),
    index("unconditional_row", SAMPLES),
    index("row_sample", ROWS),
    index("row_condition", ROWS),
    index("row_map", ROWS),
)
"""Inputs of the step: a few numbers per sample or row."""


def graph_specs(
    architecture: Architecture, resolution: int, detail_dtype: str = "float32", references: int = 1
) -> dict[str, GraphSpec]:
    """Returns graph -> its signature.

    Args:
        architecture: sizes of the network.
        resolution: side of the picture and of the hint, in pixels.
        detail_dtype: float16 in an fp16 bundle: the detail maps of all steps are what fills the memory.
        references: pictures of an object that its tokens are of.
    """
    size = (resolution, resolution)
    latent = latent_shape(architecture, size)
    tokens = (references * architecture.token_count, architecture.token_width)
    detail_maps = tuple(
        TensorSpec(f"detail_{index:02d}", detail_dtype, (MAPS, *shape))
        for index, shape in enumerate(architecture.detail_shapes(resolution))
    )
    specs = (
        id_encoder_spec(architecture),
        GraphSpec(
            CONTROL,
            "window",
            # one hint, embedded once, for any number of (timestep, tokens) pairs
            inputs=(f32("hint", 1, 4, *size), f32("timestep", MAPS), f32("tokens", MAPS, *tokens)),
            outputs=detail_maps,
        ),
        step_spec(
            latent,
            _NUMBERS,
            (f32("tokens", CONDITIONS, *tokens), *detail_maps),
            (
                BankSpec("tokens", ("tokens",), "row_condition"),
                BankSpec("detail_maps", tuple(tensor.name for tensor in detail_maps), "row_map"),
            ),
        ),
        encode_spec(latent, size),
        decode_spec(latent, size),
    )
    return {spec.name: spec for spec in specs}


class ControlGraph(nn.Module):
    """Hint, timesteps, ID tokens -> detail maps, in the dtype of the weights."""

    dtype: torch.dtype

    def __init__(self, model: AnyDoor) -> None:
        super().__init__()
        self.model = model
        self.dtype = model.control.conv_in.weight.dtype

    def forward(self, hint: Tensor, timestep: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """Maps (1, 4, H, W), (M,), (M, T, D) to one (M, C, h, w) per skip connection, and one for the
        middle."""
        return self.model.detail_maps(hint.to(self.dtype), timestep, tokens.to(self.dtype))


class DenoiseGraph(nn.Module):
    """One step: UNet, classifier-free guidance and the DDIM update, for samples that share nothing.

    Rows are the UNet's batch. The update is done in float32.
    """

    dtype: torch.dtype

    def __init__(self, model: AnyDoor) -> None:
        super().__init__()
        self.model = model
        self.dtype = model.unet.conv_in.weight.dtype

    def forward(
        self,
        latent: Tensor,
        carry: Tensor,
        timestep: Tensor,
        guidance_scale: Tensor,
        control_scale: Tensor,
        coefficients: Tensor,
        conditional_row: Tensor,
        unconditional_row: Tensor,
        row_sample: Tensor,
        row_condition: Tensor,
        row_map: Tensor,
        tokens: Tensor,
        *details: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Takes a step. Returns the next latent and the guided epsilon, both (N, C, h, w)."""
        row_scale = per_sample(control_scale).index_select(0, row_sample)
        row_epsilon = self.model.predict_noise(
            latent.index_select(0, row_sample).to(self.dtype),
            timestep.index_select(0, row_sample),
            tokens.index_select(0, row_condition).to(self.dtype),
            [detail.index_select(0, row_map) * row_scale.to(detail.dtype) for detail in details],
        ).float()
        epsilon = guided(row_epsilon, guidance_scale, conditional_row, unconditional_row)
        return weighted_sum(coefficients, latent, epsilon, carry), epsilon


GRAPH_MODULES: Mapping[str, type[nn.Module]] = {
    ID_ENCODER: IDEncoderGraph,
    CONTROL: ControlGraph,
    DENOISE: DenoiseGraph,
    ENCODE: EncodeGraph,
    DECODE: DecodeGraph,
}
