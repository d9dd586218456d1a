"""Implements what IMPRINT and Stable Diffusion share: drawing inside a mask, blended with the scene at every
step.

Sources: Blended Latent Diffusion (Avrahami et al., 2023); diffusers' `StableDiffusionInpaintPipeline`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines.errors import BundleError
from runtime.diffusion.ddim import Schedule
from runtime.errors import InputError, in_field
from runtime.imaging.geometry import warn_of_enlargement
from runtime.imaging.mask_levels import check_mask_level
from runtime.imaging.masked_scene import MaskedScene, mask_scene
from runtime.imaging.modes import check_mode
from runtime.imaging.paste_back import feathered_region, paste_feathered, place_share
from runtime.imaging.target import load_target
from runtime.parameters import PlacementParameters, SamplingParameters
from runtime.request import Placement
from runtime.result import Stopwatch
from runtime.sampling.conditions import BankRows, FixedConditions
from runtime.sampling.remembered import Remembered
from runtime.sampling.running_batch import guided_steps
from runtime.sampling.scene_latents import SceneLatents
from runtime.systems.system import Model, Prepared
from runtime.validation import Limits

ENCODE = "encode"

TOKENS, SCENE = "tokens", "scene"
"""Banks of the step graph."""

What = TypeVar("What")
"""The prepared condition."""


@dataclass(frozen=True, eq=False)
class InpaintingPlacement(Prepared, Generic[What]):
    """The condition, and its place in the scene."""

    what: What
    scene: MaskedScene


class Inpainting(ABC, Generic[What]):
    """Such a system with a model, but for what says what is drawn; see `runtime.systems.system.System`."""

    def __init__(self, model: Model, condition: str) -> None:
        """Looks up what the model has.

        Args:
            model: the bundle, and what runs it.
            condition: the graph that makes tokens.

        Raises:
            BundleError: a graph is missing, or a bank.
        """
        manifest = model.bundle.manifest
        missing = [graph for graph in (condition, ENCODE) if graph not in manifest.graphs]
        if missing:
            raise BundleError(f"the bundle at '{model.bundle.path}' has no graph '{missing[0]}'")
        self._picture_size = manifest.picture_size
        self._latent_size = manifest.latent_shape[1:]
        of_scene = next((bank.tensors for bank in manifest.step.banks if bank.name == SCENE), None)
        if of_scene is None:
            raise BundleError(f"the bundle at '{model.bundle.path}' has no bank '{SCENE}' in its step graph")
        self._scenes = SceneLatents(model.engine, ENCODE, of_scene, manifest.latent_shape)

    @abstractmethod
    def read(
        self, placement: Placement, parameters: PlacementParameters, limits: Limits, watch: Stopwatch
    ) -> What:
        """Reads what is drawn.

        Raises:
            InputError: it cannot be used.
        """

    @abstractmethod
    def tokens(self, what: What, watch: Stopwatch) -> NDArray[np.float32]:
        """Its tokens, (1, T, D)."""

    @abstractmethod
    def unconditional_tokens(self, what: What, watch: Stopwatch) -> NDArray[np.float32]:
        """Returns the unconditional tokens, (0 or 1, T, D)."""

    @property
    @abstractmethod
    def kept_tokens(self) -> Remembered[Any, Any]:
        """Tokens that are remembered."""

    def prepare(
        self,
        scene: NDArray[np.uint8],
        placement: Placement,
        parameters: PlacementParameters,
        limits: Limits,
        watch: Stopwatch,
    ) -> InpaintingPlacement[What]:
        """Reads what is drawn, and masks its place in the scene.

        Raises:
            InputError: what is drawn, the place or a parameter cannot be used.
        """
        check_mode(parameters.mode)
        ratios = parameters.ratios
        with in_field("mask_level"):
            level = check_mask_level(parameters.mask_level)
            asked = None if placement.mask_level is None else level
            if placement.box is not None and asked not in (None, "exact", "box"):
                raise InputError(
                    f"the mask level {level} is for masks, but a box is given: leave it out, or give a mask"
                )
        what = self.read(placement, parameters, limits, watch)
        with watch.measure("read"):
            target = load_target(placement.box, placement.mask, scene, limits.pixels, placement.keep_specks)
        with watch.measure("prepare"):
            masked = mask_scene(
                scene, target, ratios, parameters.mode, self._picture_size, self._latent_size, level
            )
            region = feathered_region(masked.geometry, masked.paste)
        warn_of_enlargement(masked.geometry, self._picture_size)
        share_of = partial(place_share, masked.paste, masked.geometry, scene.shape)
        return InpaintingPlacement(what, masked, region=region, share_of=share_of)

    def renew(
        self, prepared: InpaintingPlacement[What], scene: NDArray[np.uint8], watch: Stopwatch
    ) -> InpaintingPlacement[What]:
        """Returns the same placement in another scene of the same size."""
        with watch.measure("prepare"):
            return replace(prepared, scene=prepared.scene.in_scene(scene))

    def conditions(
        self,
        prepared: InpaintingPlacement[What],
        sampling: SamplingParameters,
        schedule: Schedule,
        watch: Stopwatch,
    ) -> FixedConditions:
        """Makes tokens, and latents of the scene, unless they are remembered."""
        tokens = self.tokens(prepared.what, watch)
        if any(guided_steps(sampling, schedule)):
            tokens = np.concatenate([tokens, self.unconditional_tokens(prepared.what, watch)])
        rows: Mapping[str, BankRows] = {
            TOKENS: BankRows({"tokens": tokens}, 0, len(tokens) - 1, on_host=True),
            SCENE: self._scenes.rows(prepared.scene, watch),
        }
        return FixedConditions(rows, schedule.steps)

    def finish(
        self, picture: NDArray[np.uint8], scene: NDArray[np.uint8], prepared: InpaintingPlacement[What]
    ) -> NDArray[np.uint8]:
        """Pastes the picture back with a soft edge."""
        return paste_feathered(picture, scene, prepared.scene.geometry, prepared.scene.paste)

    def kept_bytes(self) -> int:
        """Returns memory of tokens and latents that are remembered."""
        return self.kept_tokens.nbytes + self._scenes.latents.nbytes

    def clear(self) -> None:
        """Forgets tokens and latents."""
        self.kept_tokens.clear()
        self._scenes.latents.clear()
