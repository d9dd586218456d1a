"""The four graphs of a bundle: their names, inputs and outputs. Part of the model format.

    reference ------------------> [id_encoder] --> tokens
    hint, timesteps, tokens ----> [control] -----> detail maps
    latent, tokens, details ----> [denoise] -----> latent one step further
    latent ---------------------> [decode] ------> picture

Dimensions that vary from call to call are named; all others are fixed when the bundle is built:

    samples     pictures in the making. Each has its own timestep, guidance scale, strength and DDIM
                coefficients, so samples at different steps share a call.
    rows        evaluations of the UNet: one per sample without guidance, two with it. A sample without
                guidance does not pay for the unconditional half.
    conditions  sets of ID tokens at hand (references, and the unconditional one)
    maps        sets of detail maps at hand (one per hint, timestep and set of ID tokens)

The denoise graph gathers what each row needs by index. One picture, four samples of one placement, or
several requests at different steps are then the same call, and nothing is copied to get there.

The decode graph takes one picture at a time: a single one keeps a card busy, and its intermediate results, by
far the largest of all graphs, would grow with the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ID_ENCODER = "id_encoder"
CONTROL = "control"
DENOISE = "denoise"
DECODE = "decode"
GRAPHS = (ID_ENCODER, CONTROL, DENOISE, DECODE)

SAMPLES = "samples"
ROWS = "rows"
CONDITIONS = "conditions"
MAPS = "maps"
VARIABLE_DIMENSIONS = (SAMPLES, ROWS, CONDITIONS, MAPS)

STEP_INPUTS = (
    "timestep",
    "guidance_scale",
    "control_scale",
    "coefficients",
    "conditional_row",
    "unconditional_row",
    "row_sample",
    "row_condition",
    "row_map",
)
"""The inputs of the denoise graph that say what a step is: a few numbers per row, others at every step."""

Dimension = int | str


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str
    dtype: str
    """NumPy name of the dtype: float32, float16, int32 or uint8."""
    shape: tuple[Dimension, ...]
    """Sizes; a string is one of `VARIABLE_DIMENSIONS`."""

    def resolve(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The shape with every variable dimension replaced by its size."""
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.shape)

    def nbytes(self, sizes: dict[str, int]) -> int:
        """Memory of a tensor of these sizes."""
        return math.prod(self.resolve(sizes)) * np.dtype(self.dtype).itemsize


def largest_sizes(max_batch: int) -> dict[str, int]:
    """Variable dimension -> its largest size in a bundle for `max_batch` samples."""
    return {SAMPLES: max_batch, ROWS: 2 * max_batch, CONDITIONS: 2 * max_batch, MAPS: 2 * max_batch}


@dataclass(frozen=True)
class GraphSpec:
    """The signature of one graph."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Inputs, then outputs."""
        return self.inputs + self.outputs

    def sizes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Variable dimension -> its size in a call.

        Args:
            shapes: shape of every input.
        """
        return {
            dimension: size
            for tensor in self.inputs
            for dimension, size in zip(tensor.shape, shapes[tensor.name])
            if isinstance(dimension, str)
        }


@dataclass(frozen=True)
class ModelShape:
    """The sizes that the signatures of the graphs depend on."""

    resolution: int
    """Side of the generated picture and of the hint, in pixels."""
    latent_channels: int
    latent_size: int
    """Side of the latent, in latent pixels."""
    token_count: int
    """ID tokens per reference: the class token and one per patch."""
    token_width: int
    reference_size: int
    """Side of the reference that the ID encoder looks at, in pixels."""
    detail_shapes: tuple[tuple[int, int, int], ...]
    """(channels, height, width) of each detail map, first to last; the last belongs to the middle block."""
    detail_dtype: str = "float32"
    """float16 in an fp16 bundle: the detail maps of all steps are what fills the memory."""


def detail_names(count: int) -> tuple[str, ...]:
    """Names of the detail maps, in the order of the ControlNet's outputs."""
    return tuple(f"detail_{i:02d}" for i in range(count))


def graph_specs(shape: ModelShape) -> dict[str, GraphSpec]:
    """The signatures of all graphs of a model, by graph name.

    Value ranges: `reference` 0..1 RGB; `hint` three channels of collage in -1..1 RGB and the mask channel
    (-1, 0 or 1); `timestep` 0..999; `coefficients` as `runtime.diffusion.ddim` defines them; `decoded` -1..1 before
    clipping; `image` 0..255 RGB. The index inputs count from 0.
    """
    size, latent = shape.resolution, (shape.latent_channels, shape.latent_size, shape.latent_size)
    tokens = (shape.token_count, shape.token_width)
    details = tuple(zip(detail_names(len(shape.detail_shapes)), shape.detail_shapes))

    def f32(name: str, *dims: Dimension) -> TensorSpec:
        return TensorSpec(name, "float32", dims)

    def index(name: str, *dims: Dimension) -> TensorSpec:
        return TensorSpec(name, "int32", dims)

    def detail_maps(first: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, shape.detail_dtype, (first, *dims)) for name, dims in details)

    reference = shape.reference_size
    return {
        ID_ENCODER: GraphSpec(
            ID_ENCODER,
            inputs=(f32("reference", SAMPLES, 3, reference, reference),),
            outputs=(f32("tokens", SAMPLES, *tokens),),
        ),
        CONTROL: GraphSpec(
            CONTROL,
            # One hint, embedded once, for any number of (timestep, tokens) pairs.
            inputs=(f32("hint", 1, 4, size, size), f32("timestep", MAPS), f32("tokens", MAPS, *tokens)),
            outputs=detail_maps(MAPS),
        ),
        DENOISE: GraphSpec(
            DENOISE,
            inputs=(
                f32("latent", SAMPLES, *latent),
                f32("carry", SAMPLES, *latent),
                f32("timestep", SAMPLES),
                f32("guidance_scale", SAMPLES),
                f32("control_scale", SAMPLES),
                f32("coefficients", SAMPLES, 3),
                index("conditional_row", SAMPLES),
                index("unconditional_row", SAMPLES),
                index("row_sample", ROWS),
                index("row_condition", ROWS),
                index("row_map", ROWS),
                f32("tokens", CONDITIONS, *tokens),
                *detail_maps(MAPS),
            ),
            outputs=(f32("next_latent", SAMPLES, *latent), f32("epsilon", SAMPLES, *latent)),
        ),
        DECODE: GraphSpec(
            DECODE,
            inputs=(f32("latent", 1, *latent),),
            outputs=(TensorSpec("image", "uint8", (1, size, size, 3)), f32("decoded", 1, 3, size, size)),
        ),
    }
