"""AnyDoor's graphs: PyTorch modules and their signatures.

    reference ------------------> [id_encoder] --> tokens
    hint, timesteps, tokens ----> [control] -----> detail maps
    latent, tokens, details ----> [denoise] -----> latent one step further
    latent ---------------------> [decode] ------> picture

Value ranges: `reference` 0..1 RGB; `hint` three channels of collage in -1..1 RGB and the mask channel (-1, 0
or 1); `timestep` 0..999; `coefficients` as `runtime.diffusion.ddim` defines them; `carry` noise, or what the
sampler keeps of the step before; `decoded` -1..1 before clipping; `image` 0..255 RGB. Index inputs count from
0.

The decode graph takes one picture at a time: a single one keeps a card busy, and its intermediate results, by
far the largest of all graphs, would grow with the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from engines.engine import Array, Engine
from engines.errors import AnyDoorError
from engines.spec import ROWS, SAMPLES, BankSpec, Dimension, GraphSpec, TensorSpec
from export.precision import BANK_DTYPES, keep_float32_layers
from export.systems.system import GraphExport
from training.network.architecture import REFERENCE_SIZE, Architecture
from training.network.checkpoint import Checkpoint
from training.network.modules import AnyDoor

ID_ENCODER = "id_encoder"
CONTROL = "control"
DENOISE = "denoise"
DECODE = "decode"

CONDITIONS = "conditions"
"""Dimension: sets of ID tokens in a call, of references and of the black picture."""
MAPS = "maps"
"""Dimension: sets of detail maps in a call, one per hint, timestep and set of ID tokens."""

DIMENSIONS = {SAMPLES: 1, ROWS: 2, CONDITIONS: 2, MAPS: 2}

PARTS = {ID_ENCODER: "id_encoder", CONTROL: "control", DENOISE: "unet", DECODE: "vae"}
"""Graph -> the part of `AnyDoor` whose weights it holds."""


class AnyDoorSource:
    """An AnyDoor checkpoint, ready for export; see `export.systems.system.ExportSource`."""

    system = "anydoor"
    dimensions: Mapping[str, int] = DIMENSIONS

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        self.dtype = checkpoint.dtype
        self.defaults = checkpoint.defaults
        self.architecture: Mapping[str, Any] = asdict(checkpoint.architecture)
        self._checkpoint = checkpoint

    @classmethod
    def without_weights(cls, architecture: Architecture, dtype: torch.dtype) -> AnyDoorSource:
        """A network of any size whose weights are zeros that take no memory, to export skeletons from."""
        with torch.device("meta"):
            shapes = AnyDoor(architecture).official_shapes()
        zero = torch.zeros((), dtype=dtype)
        tensors = {key: zero.expand(shape) for key, shape in shapes.items()}
        return cls(Checkpoint(Path("without weights"), architecture, tensors))

    @property
    def description(self) -> str:
        """What the checkpoint is."""
        return self._checkpoint.describe()

    def check_resolution(self, resolution: int) -> None:
        """Refuses a picture size that the network cannot halve often enough.

        Raises:
            AnyDoorError: it cannot.
        """
        a = self._checkpoint.architecture
        step = a.latent_factor * 2 ** (len(a.unet_channels) - 1)
        if resolution < step or resolution % step:
            raise AnyDoorError(
                f"--resolution must be a multiple of {step} for this network, not {resolution}"
            )

    def graphs(self, resolution: int, precision: str) -> Sequence[GraphExport]:
        """The four graphs, the largest first."""
        specs = graph_specs(self._checkpoint.architecture, resolution, BANK_DTYPES[precision])
        examples = {"reference": lambda rng, shape: rng.random(shape, dtype=np.float32)}
        return [GraphExport(spec, partial(self._load, name), examples) for name, spec in specs.items()]

    def constants(self, engine: Engine) -> dict[str, NDArray[np.float32]]:
        """The noise schedule, and the tokens of the black picture that stand for no reference (1, T, D)."""
        black: Array = np.zeros((1, 3, REFERENCE_SIZE, REFERENCE_SIZE), np.float32)
        tokens = engine.to_host(engine.run(ID_ENCODER, {"reference": black})["tokens"])
        schedule = self._checkpoint.alphas_cumprod
        if schedule is None:
            schedule = AnyDoor(self._checkpoint.architecture, parts=[]).alphas_cumprod
        return {"unconditional_tokens": tokens, "alphas_cumprod": schedule.float().numpy()}

    def _load(self, graph: str, dtype: torch.dtype) -> nn.Module:
        part = self._checkpoint.load_part(PARTS[graph], dtype)
        if dtype != torch.float32:
            keep_float32_layers(part)
        return GRAPH_MODULES[graph](part).eval()


def _f32(name: str, *shape: Dimension) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


def _index(name: str, dimension: str) -> TensorSpec:
    return TensorSpec(name, "int32", (dimension,))


_NUMBERS = (
    _f32("timestep", SAMPLES),
    _f32("guidance_scale", SAMPLES),
    _f32("control_scale", SAMPLES),
    _f32("coefficients", SAMPLES, 3),
    _index("conditional_row", SAMPLES),
    _index("unconditional_row", SAMPLES),
    _index("row_sample", ROWS),
    _index("row_condition", ROWS),
    _index("row_map", ROWS),
)
"""Inputs of the step: a few numbers per sample or row."""


def graph_specs(
    architecture: Architecture, resolution: int, detail_dtype: str = "float32"
) -> dict[str, GraphSpec]:
    """Graph -> its signature.

    Args:
        architecture: sizes of the network.
        resolution: side of the picture and of the hint, in pixels.
        detail_dtype: float16 in an fp16 bundle: the detail maps of all steps are what fills the memory.
    """
    size, side = resolution, resolution // architecture.latent_factor
    latent = (architecture.latent_channels, side, side)
    tokens = (architecture.token_count, architecture.token_width)
    detail_maps = tuple(
        TensorSpec(f"detail_{index:02d}", detail_dtype, (MAPS, *shape))
        for index, shape in enumerate(architecture.detail_shapes(resolution))
    )
    specs = (
        GraphSpec(
            ID_ENCODER,
            "condition",
            inputs=(_f32("reference", SAMPLES, 3, REFERENCE_SIZE, REFERENCE_SIZE),),
            outputs=(_f32("tokens", SAMPLES, *tokens),),
        ),
        GraphSpec(
            CONTROL,
            "window",
            # one hint, embedded once, for any number of (timestep, tokens) pairs
            inputs=(_f32("hint", 1, 4, size, size), _f32("timestep", MAPS), _f32("tokens", MAPS, *tokens)),
            outputs=detail_maps,
        ),
        GraphSpec(
            DENOISE,
            "step",
            inputs=(
                _f32("latent", SAMPLES, *latent),
                _f32("carry", SAMPLES, *latent),
                *_NUMBERS,
                _f32("tokens", CONDITIONS, *tokens),
                *detail_maps,
            ),
            outputs=(_f32("next_latent", SAMPLES, *latent), _f32("epsilon", SAMPLES, *latent)),
            banks=(
                BankSpec("tokens", ("tokens",), "row_condition"),
                BankSpec("detail_maps", tuple(tensor.name for tensor in detail_maps), "row_map"),
            ),
            per_step=tuple(tensor.name for tensor in _NUMBERS),
            feedback={"latent": "next_latent", "carry": "epsilon"},
        ),
        GraphSpec(
            DECODE,
            "decode",
            inputs=(_f32("latent", 1, *latent),),
            outputs=(TensorSpec("image", "uint8", (1, size, size, 3)), _f32("decoded", 1, 3, size, size)),
        ),
    )
    return {spec.name: spec for spec in specs}


_UNMASKED = "sdpa_unmasked"


class IDEncoderGraph(nn.Module):
    """Reference -> ID tokens."""

    dtype: torch.dtype

    def __init__(self, model: AnyDoor) -> None:
        super().__init__()
        self.model = model
        # while it is traced, transformers makes a mask that masks nothing, and PyTorch guards against rows
        # that are all masked; it makes none for an implementation that it does not know
        AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
        model.id_encoder.dino.set_attn_implementation(_UNMASKED)
        model.id_encoder.fix_positions(REFERENCE_SIZE)
        self.dtype = model.id_encoder.projector.weight.dtype

    def forward(self, reference: Tensor) -> Tensor:
        """(N, 3, 224, 224) in 0..1 -> (N, T, D)."""
        return self.model.encode_reference(reference.to(self.dtype)).float()


class ControlGraph(nn.Module):
    """Hint, timesteps, ID tokens -> detail maps, in the dtype of the weights."""

    dtype: torch.dtype

    def __init__(self, model: AnyDoor) -> None:
        super().__init__()
        self.model = model
        self.dtype = model.control.conv_in.weight.dtype

    def forward(self, hint: Tensor, timestep: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """(1, 4, H, W), (M,), (M, T, D) -> one (M, C, h, w) per skip connection, and one for the middle."""
        return self.model.detail_maps(hint.to(self.dtype), timestep, tokens.to(self.dtype))


class DenoiseGraph(nn.Module):
    """One step: UNet, classifier-free guidance and the DDIM update, for samples that share nothing.

    Rows are the UNet's batch. A sample without guidance names the same row as its conditional and its
    unconditional one, and the guidance term vanishes exactly. The update is done in float32.
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
        row_scale = _per_sample(control_scale).index_select(0, row_sample)
        row_epsilon = self.model.predict_noise(
            latent.index_select(0, row_sample).to(self.dtype),
            timestep.index_select(0, row_sample),
            tokens.index_select(0, row_condition).to(self.dtype),
            [detail.index_select(0, row_map) * row_scale.to(detail.dtype) for detail in details],
        ).float()
        conditional = row_epsilon.index_select(0, conditional_row)
        unconditional = row_epsilon.index_select(0, unconditional_row)
        epsilon = unconditional + _per_sample(guidance_scale) * (conditional - unconditional)
        from_latent, from_epsilon, from_carry = coefficients.unbind(1)
        next_latent = (
            _per_sample(from_latent) * latent
            + _per_sample(from_epsilon) * epsilon
            + _per_sample(from_carry) * carry
        )
        return next_latent, epsilon


class DecodeGraph(nn.Module):
    """Latent -> picture."""

    dtype: torch.dtype

    def __init__(self, model: AnyDoor) -> None:
        super().__init__()
        self.model = model
        self.dtype = model.vae.post_quant_conv.weight.dtype

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(1, C, h, w) -> (1, H, W, 3) uint8 RGB, and the same before clipping, (1, 3, H, W) in -1..1."""
        decoded = self.model.decode(latent.to(self.dtype)).float()
        image = (decoded * 127.5 + 127.5).clamp(0, 255).round().permute(0, 2, 3, 1)
        # TensorRT knows uint8 at the border of a network only: nothing may follow the cast
        return image.to(torch.uint8), decoded


GRAPH_MODULES: Mapping[str, type[nn.Module]] = {
    ID_ENCODER: IDEncoderGraph,
    CONTROL: ControlGraph,
    DENOISE: DenoiseGraph,
    DECODE: DecodeGraph,
}


def _per_sample(values: Tensor) -> Tensor:
    return values[:, None, None, None]
