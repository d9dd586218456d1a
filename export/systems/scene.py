"""Defines graphs for drawing into a scene: the encoder of pictures, and a step that blends the latent with
the scene's.

    scene ----------------------------> [encode] --------> its latent
    latent, tokens, scene, background > [denoise] -------> latent one step further

With a `blend` of 1 everywhere the update leaves the background out. Sources: Avrahami et al., 2022 (Blended
Latent Diffusion), section 3; `StableDiffusionInpaintPipeline` in diffusers, which the step equals.

Value ranges: `picture` -1..1 RGB; `scene` a mask (1 where to draw) and the latent of the scene whose masked
part is grey; `blend` 0..1, 1 where the network draws; `start_noise` the first latent of a sample;
`background_coefficients` as in `runtime.diffusion.ddim`; the others as in `export.systems.diffusion`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from engines.spec import ROWS, SAMPLES, BankSpec, GraphSpec, TensorSpec
from export.systems.diffusion import (
    CONDITIONS,
    f32,
    guided,
    index,
    latent_shape,
    step_spec,
    weighted_sum,
)
from export.systems.system import Draw, Size
from training.network.architecture import SceneArchitecture
from training.network.imprint import Imprint
from training.network.stable_diffusion import StableDiffusion

SCENES = "scenes"
"""Dimension: scenes in a call, one per placement."""

DIMENSIONS: Mapping[str, int] = {SAMPLES: 1, ROWS: 2, CONDITIONS: 2, SCENES: 1}

EXAMPLES: Mapping[str, Draw] = {"blend": lambda rng, shape: rng.random(shape, dtype=np.float32)}
"""Inputs for which normal random numbers make no sense."""

_NUMBERS = (
    f32("timestep", SAMPLES),
    f32("guidance_scale", SAMPLES),
    f32("coefficients", SAMPLES, 3),
    f32("background_coefficients", SAMPLES, 2),
    index("conditional_row", SAMPLES),
    index("unconditional_row", SAMPLES),
    index("row_sample", ROWS),
    index("row_condition", ROWS),
    index("row_scene", ROWS),
)
"""Inputs of the step: a few numbers per sample or row."""


def blended_step_spec(architecture: SceneArchitecture, size: Size, tokens: TensorSpec) -> GraphSpec:
    """Returns the signature of the step graph.

    Args:
        architecture: sizes of the network.
        size: of the picture.
        tokens: its input of what says what is drawn.
    """
    latent = latent_shape(architecture, size)
    scene = [f32("background", SCENES, *latent), f32("blend", SCENES, 1, *latent[1:])]
    if architecture.scene_channels:
        scene.append(f32("scene", SCENES, architecture.scene_channels, *latent[1:]))
    return step_spec(
        latent,
        _NUMBERS,
        (tokens, *scene),
        (
            BankSpec("tokens", (tokens.name,), "row_condition"),
            BankSpec("scene", tuple(tensor.name for tensor in scene), "row_scene"),
        ),
        fixed=(f32("start_noise", SAMPLES, *latent),),
    )


def blended(drawn: Tensor, kept: Tensor, blend: Tensor) -> Tensor:
    """Returns what is drawn where `blend` is 1, what is kept where it is 0, exactly, and a mixture
    between."""
    return blend * drawn + (1 - blend) * kept


class DenoiseGraph(nn.Module):
    """One step: UNet, classifier-free guidance, the update, and blending with the background.

    Samples share nothing. Rows are the UNet's batch; the scene of a sample is that of its conditional row.
    All but the UNet is computed in float32. A `blend` of 1 changes nothing, one of 0 gives the background as
    it is after the step.
    """

    dtype: torch.dtype

    def __init__(self, model: StableDiffusion | Imprint) -> None:
        super().__init__()
        self.model = model
        self.dtype = model.unet.conv_in.weight.dtype

    def forward(
        self,
        latent: Tensor,
        carry: Tensor,
        start_noise: Tensor,
        timestep: Tensor,
        guidance_scale: Tensor,
        coefficients: Tensor,
        background_coefficients: Tensor,
        conditional_row: Tensor,
        unconditional_row: Tensor,
        row_sample: Tensor,
        row_condition: Tensor,
        row_scene: Tensor,
        tokens: Tensor,
        background: Tensor,
        blend: Tensor,
        *scene: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Takes a step. Returns the next latent and the guided epsilon, both (N, C, h, w)."""
        row_epsilon = self.model.predict_noise(
            latent.index_select(0, row_sample).to(self.dtype),
            timestep.index_select(0, row_sample),
            tokens.index_select(0, row_condition).to(self.dtype),
            *(of_scene.index_select(0, row_scene).to(self.dtype) for of_scene in scene),
        ).float()
        epsilon = guided(row_epsilon, guidance_scale, conditional_row, unconditional_row)
        drawn = weighted_sum(coefficients, latent, epsilon, carry)
        sample_scene = row_scene.index_select(0, conditional_row)
        kept = weighted_sum(background_coefficients, background.index_select(0, sample_scene), start_noise)
        return blended(drawn, kept, blend.index_select(0, sample_scene)), epsilon
