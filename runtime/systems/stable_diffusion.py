"""Stable Diffusion and what is tuned from it, like DreamBooth: a prompt says what is drawn, into a scene or
from nothing.

Sources: Rombach et al., 2022; DreamBooth (Ruiz et al., 2023); Blended Latent Diffusion (Avrahami et al.,
2023); diffusers' `StableDiffusionPipeline` and `StableDiffusionInpaintPipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import BundleError
from runtime.diffusion.ddim import Schedule
from runtime.diffusion.presets import EXACT
from runtime.errors import in_field
from runtime.imaging.boxes import Box
from runtime.imaging.geometry import warn_of_enlargement
from runtime.imaging.masked_scene import MaskedScene, mask_scene
from runtime.imaging.modes import check_mode
from runtime.imaging.paste_back import feathered_region, paste_feathered
from runtime.imaging.target import load_target
from runtime.parameters import PlacementParameters, SamplingParameters
from runtime.request import Placement
from runtime.result import Stopwatch
from runtime.sampling.conditions import BankRows
from runtime.sampling.remembered import Remembered
from runtime.sampling.running_batch import guided_steps
from runtime.sampling.scene_latents import SceneLatents
from runtime.systems.system import Model
from runtime.systems.tokenizer import open_tokenizer
from runtime.validation import Abilities, Limits

TEXT_ENCODER = "text_encoder"
ENCODE = "encode"

TOKENS, SCENE = "tokens", "scene"
"""Banks of the step graph."""

DEFAULTS: Mapping[str, Any] = {
    "steps": 50,
    "guidance_scale": 7.5,
    "eta": 0.0,
    "sampler": "ddim",
    "guidance_interval": (0, 999),
    "timesteps": None,
    "mode": "keep_background",
    "box_ratio": 1.1,
    "crop_ratio": 2.0,
}
"""Steps and guidance scale of diffusers' pipelines; the ratios are those of AnyDoor."""

ABILITIES = Abilities("Stable Diffusion", "text", DEFAULTS, [EXACT])

_KEPT_PROMPTS = 64
"""Prompts whose tokens are remembered; 300 KB each at full size."""

Ids = tuple[int, ...]
"""An encoded prompt."""


@dataclass(frozen=True, eq=False)
class TextPlacement:
    """An encoded prompt and its place in the scene."""

    prompt: Ids
    negative_prompt: Ids | None
    """None: guidance leads away from the empty prompt."""
    scene: MaskedScene
    region: Box


@dataclass(frozen=True, eq=False)
class TextConditions:
    """Tokens and scene, the same at every step."""

    rows: Mapping[str, BankRows]
    steps: int

    def banks(self, step: int) -> Mapping[str, BankRows]:
        """Bank -> its rows at a step."""
        return self.rows

    def steps_ready(self, step: int) -> int:
        """All that are left."""
        return self.steps - step


class StableDiffusion:
    """The system with a model; see `runtime.systems.system.System`."""

    abilities = ABILITIES
    defaults = DEFAULTS

    def __init__(self, model: Model) -> None:
        """Looks up what the model has, and reads its tokenizer.

        Raises:
            BundleError: a graph or the tokenizer is missing, or the tokenizer is damaged.
        """
        manifest = model.bundle.manifest
        missing = [graph for graph in (TEXT_ENCODER, ENCODE) if graph not in manifest.graphs]
        if missing:
            raise BundleError(f"the bundle at '{model.bundle.path}' has no graph '{missing[0]}'")
        self._engine = model.engine
        self._tokenizer = open_tokenizer(model.bundle)
        self._no_prompt = model.constants["unconditional_tokens"]
        self._picture_size = manifest.picture_size
        self._latent_size = manifest.latent_shape[1:]
        of_scene = next(bank.tensors for bank in manifest.step.banks if bank.name == SCENE)
        self._scenes = SceneLatents(model.engine, ENCODE, of_scene, manifest.latent_shape)
        self._tokens = Remembered[Ids](_KEPT_PROMPTS)

    def prepare(
        self,
        scene: NDArray[np.uint8],
        placement: Placement,
        parameters: PlacementParameters,
        limits: Limits,
        watch: Stopwatch,
    ) -> TextPlacement:
        """Encodes the prompts, and masks the place in the scene.

        Raises:
            InputError: a prompt, the place or a parameter cannot be used.
        """
        check_mode(parameters.mode)
        ratios = parameters.ratios
        prompt = self._encode_prompt("prompt", placement.prompt)
        negative_prompt = self._encode_prompt("negative_prompt", placement.negative_prompt)
        assert prompt is not None
        with watch.measure("read"):
            target = load_target(placement.box, placement.mask, scene, limits.pixels, placement.keep_specks)
        with watch.measure("prepare"):
            masked = mask_scene(scene, target, ratios, parameters.mode, self._picture_size, self._latent_size)
            region = feathered_region(masked.geometry, masked.paste)
        warn_of_enlargement(masked.geometry, self._picture_size)
        return TextPlacement(prompt, negative_prompt, masked, region)

    def renew(self, prepared: TextPlacement, scene: NDArray[np.uint8], watch: Stopwatch) -> TextPlacement:
        """The same placement in another scene of the same size."""
        with watch.measure("prepare"):
            return replace(prepared, scene=prepared.scene.in_scene(scene))

    def conditions(
        self, prepared: TextPlacement, sampling: SamplingParameters, schedule: Schedule, watch: Stopwatch
    ) -> TextConditions:
        """Encodes prompts and scene, unless they are remembered."""
        tokens = self._encode(prepared.prompt, watch)
        if any(guided_steps(sampling, schedule)):
            away = prepared.negative_prompt
            unconditional = self._no_prompt if away is None else self._encode(away, watch)
            tokens = np.concatenate([tokens, unconditional])
        rows = {
            TOKENS: BankRows({"tokens": tokens}, 0, len(tokens) - 1, on_host=True),
            SCENE: self._scenes.rows(prepared.scene, watch),
        }
        return TextConditions(rows, schedule.steps)

    def finish(
        self, picture: NDArray[np.uint8], scene: NDArray[np.uint8], prepared: TextPlacement
    ) -> NDArray[np.uint8]:
        """Pastes the picture back with a soft edge."""
        return paste_feathered(picture, scene, prepared.scene.geometry, prepared.scene.paste)

    def kept_bytes(self) -> int:
        """Memory of tokens and latents that are remembered."""
        return self._tokens.nbytes + self._scenes.latents.nbytes

    def clear(self) -> None:
        """Forgets tokens and latents."""
        self._tokens.clear()
        self._scenes.latents.clear()

    def _encode_prompt(self, name: str, prompt: str | None) -> Ids | None:
        with in_field(name):
            return None if prompt is None else tuple(self._tokenizer.encode(prompt))

    def _encode(self, ids: Ids, watch: Stopwatch) -> NDArray[np.float32]:
        """Tokens of an encoded prompt, (1, 77, D)."""

        def compute() -> NDArray[np.float32]:
            with watch.measure("condition"):
                outputs = self._engine.run(TEXT_ENCODER, {"ids": np.array([ids], np.int32)})
                return self._engine.to_host(outputs["tokens"])

        return self._tokens.get(ids, compute)


def create(model: Model) -> StableDiffusion:
    """The system at work with a model."""
    return StableDiffusion(model)
