"""Implements IMPRINT and ObjectStitch: tokens of the reference condition what is drawn inside a mask of the
scene.

Without a reference the scene goes on inside the mask. Sources: IMPRINT (Song et al., 2024), section 3.2;
ObjectStitch (Song et al., 2023). The authors of the first have published no code, so what its paper does not
say is chosen here; docs/systems.md lists it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import BundleError
from runtime.diffusion.presets import EXACT
from runtime.errors import InputError, in_field
from runtime.imaging.reference import BACKGROUNDS, prepare_reference
from runtime.parameters import PlacementParameters
from runtime.request import Placement
from runtime.result import Stopwatch
from runtime.sampling.reference_tokens import ReferenceTokens
from runtime.sampling.remembered import Remembered
from runtime.systems.inpainting import Inpainting
from runtime.systems.system import Model
from runtime.systems.views import load_views
from runtime.validation import Abilities, Limits

ID_ENCODER = "id_encoder"

DEFAULTS: Mapping[str, Any] = {
    "steps": 50,
    "guidance_scale": 3.0,
    "eta": 0.0,
    "sampler": "ddim",
    "guidance_interval": (0, 999),
    "timesteps": None,
    "mode": "keep_background",
    "mask_level": "exact",
    "reference_ratio": 1.2,
    "box_ratio": 1.1,
    "crop_ratio": 2.0,
}
"""The guidance scale is that of ObjectStitch's paper; the ratios are those of AnyDoor."""

ABILITIES = Abilities("IMPRINT", "reference", DEFAULTS, [EXACT, "balanced"], fills=True)
"""The preset "fast" is not four times as fast as exact: there are no detail maps to save."""

Reference = Sequence[NDArray[np.uint8]]
"""Pictures of the object, (S, S, 3) RGB on its background; none if there is nothing to draw but the scene."""


class Imprint(Inpainting[Reference]):
    """The system with a model; see `runtime.systems.system.System`."""

    defaults = DEFAULTS

    def __init__(self, model: Model) -> None:
        """Looks up what the model has.

        Raises:
            BundleError: a graph or a constant is missing.
        """
        super().__init__(model, ID_ENCODER)
        manifest = model.bundle.manifest
        spec, sizes = manifest.specs[ID_ENCODER], manifest.typical_sizes
        self._tokens = ReferenceTokens(model.engine, spec, manifest.step, sizes)
        self.abilities = replace(ABILITIES, views=self._tokens.views)
        self._background = _background_of(model)
        no_reference = model.constant("unconditional_tokens", self._tokens.shape)
        self._no_reference = self._tokens.repeated(no_reference)

    def read(
        self, placement: Placement, parameters: PlacementParameters, limits: Limits, watch: Stopwatch
    ) -> Reference:
        """Cuts the object out of the reference.

        Raises:
            InputError: the reference cannot be used.
        """
        if placement.reference is None:
            with in_field("reference_mask"):
                if placement.reference_mask is not None:
                    raise InputError("a reference mask needs a reference: give both, or neither")
            return ()
        with watch.measure("read"):
            read = load_views(placement, limits.pixels)
        with watch.measure("prepare"):
            how = parameters.ratios.reference, self._tokens.side, self._background
            return [prepare_reference(picture, mask, *how).image for picture, mask in read]

    def tokens(self, what: Reference, watch: Stopwatch) -> NDArray[np.float32]:
        """Returns the object's, (1, N T, D)."""
        return self._tokens.of_views(what, watch) if what else self._no_reference

    def unconditional_tokens(self, what: Reference, watch: Stopwatch) -> NDArray[np.float32]:
        """Returns the tokens of an absent reference; none if the request has no reference."""
        return self._no_reference[: bool(what)]

    @property
    def kept_tokens(self) -> Remembered[Any, Any]:
        """Tokens that are remembered."""
        return self._tokens.kept


def _background_of(model: Model) -> int:
    """Returns the grey level around the objects that a model was trained with: white, unless it says black.

    Raises:
        BundleError: it says something else.
    """
    given = model.bundle.manifest.architecture.get("reference_background", "white")
    if given not in tuple(BACKGROUNDS):
        raise BundleError(
            f"the bundle at '{model.bundle.path}' wants references on {given!r}; white and black are known"
        )
    return BACKGROUNDS[given]


def create(model: Model) -> Imprint:
    """Returns the system at work with a model."""
    return Imprint(model)
