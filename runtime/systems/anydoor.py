"""Implements AnyDoor: ID tokens of the reference and detail maps of a collage condition the sampling.

Source: AnyDoor (Chen et al., CVPR 2024), section 3; the released code, run_inference.py and
run_gradio_demo.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import BundleError
from runtime.diffusion.ddim import Schedule
from runtime.diffusion.presets import QUALITIES
from runtime.errors import InputError, in_field
from runtime.imaging.boxes import Box, bounding_box, box_in_box
from runtime.imaging.collage import Hint, collage, crop_scene, hint_at, shape_mask, to_network
from runtime.imaging.geometry import Geometry, Ratios, warn_of_enlargement, zoom_in
from runtime.imaging.masked_scene import feathered_box
from runtime.imaging.modes import MODES, Mode, check_mode
from runtime.imaging.paste_back import (
    HARD,
    SOFT,
    check_edge,
    feathered_region,
    paste_back,
    paste_feathered,
    pasted_region,
)
from runtime.imaging.pasted_object import object_pixels, paste_object, place_of
from runtime.imaging.reference import PreparedReference, prepare_reference, square_side
from runtime.imaging.target import load_target
from runtime.imaging.tiles import paste_tile, tiles_of
from runtime.parameters import PlacementParameters, SamplingParameters
from runtime.request import Placement
from runtime.result import Stopwatch
from runtime.sampling.conditions import BankRows
from runtime.sampling.detail_maps import DetailMapCache, DetailMaps, shared_timesteps
from runtime.sampling.passes import check_refine, check_strength
from runtime.sampling.reference_tokens import ReferenceTokens
from runtime.sampling.remembered import Remembered, digest
from runtime.sampling.running_batch import guided_steps
from runtime.systems.system import Model, Prepared
from runtime.systems.views import load_views
from runtime.validation import Abilities, Limits

ID_ENCODER = "id_encoder"
CONTROL = "control"

_KEPT_PLACEMENTS = 8
"""References and hints that are remembered; 4.5 MiB each at 512 px."""

DEFAULTS: Mapping[str, Any] = {
    "steps": 50,
    "guidance_scale": 5.0,
    "control_scale": 1.0,
    "eta": 0.0,
    "sampler": "ddim",
    "guidance_interval": (0, 999),
    "map_steps": None,
    "timesteps": None,
    "mode": "crop",
    "edge": HARD,
    "refine": 0,
    "strength": 1.0,
    "reference_ratio": 1.2,
    "box_ratio": 1.1,
    "crop_ratio": 2.0,
}
"""The original's (run_inference.py)."""

ABILITIES = Abilities("AnyDoor", "reference", DEFAULTS, QUALITIES)


@dataclass(frozen=True, eq=False)
class AnyDoorPlacement(Prepared):
    """A placement without its full-size reference: a job that waits keeps no more than it needs."""

    reference: PreparedReference
    """Its details go into the hint."""
    views: Sequence[NDArray[np.uint8]]
    """All pictures of the object, the reference's among them; each as the ID encoder takes it."""
    target: Box | NDArray[np.bool_]
    mode: Mode
    ratios: Ratios
    hint: Hint
    hint_key: bytes
    """Tells the hint from all others."""
    fade: NDArray[np.float32] | None
    """(R, R), share of the networks' picture that is pasted; None for a hard edge."""
    pixels: NDArray[np.uint8] | None = None
    """(h, w, 4), the object itself (`object_pixels`); None at full strength."""


@dataclass(frozen=True, eq=False)
class AnyDoorTile(Prepared):
    """A part of a placement that is drawn again, larger."""

    place: AnyDoorPlacement
    geometry: Geometry
    """Geometry of the tile; its box is that of the whole place."""
    details: NDArray[np.uint8]
    """(S, S, 3) RGB, the reference's high-frequency map, as large as the tile shows it."""
    hint: Hint | None = None
    """Once the scene is there that the tile is a part of."""


@dataclass(frozen=True, eq=False)
class AnyDoorConditions:
    """ID tokens, and detail maps along the schedule."""

    tokens: BankRows
    maps: DetailMaps

    def banks(self, step: int) -> Mapping[str, BankRows]:
        """Bank -> its rows at a step."""
        return {"tokens": self.tokens, "detail_maps": self.maps.at(step)}

    def steps_ready(self, step: int) -> int:
        """Returns how many steps from this one on have their detail maps in the same tensors."""
        return self.maps.steps_ready(step)


class Preprocessing:
    """Prepares placements for the networks and finishes their pictures; needs no engine."""

    def __init__(self, resolution: int, reference_size: int) -> None:
        """Keeps the sizes.

        Args:
            resolution: side of the hint and of the networks' picture, in pixels.
            reference_size: side of the reference that the ID encoder takes, in pixels.
        """
        self._resolution = resolution
        self._reference_size = reference_size
        self.encodes = True
        """Whether there is what encodes pictures, to start from one instead of noise."""
        self._references = Remembered[bytes, PreparedReference](_KEPT_PLACEMENTS)
        self._hints = Remembered[bytes, Hint](_KEPT_PLACEMENTS)

    def prepare(
        self,
        scene: NDArray[np.uint8],
        placement: Placement,
        parameters: PlacementParameters,
        limits: Limits,
        watch: Stopwatch,
    ) -> AnyDoorPlacement:
        """Reads the reference and its place, and makes the collage of both and the scene.

        Raises:
            InputError: a picture, a mask, the place or a parameter cannot be used.
        """
        check_mode(parameters.mode)
        soft = check_edge(parameters.edge) == SOFT
        refine, strength = check_refine(parameters.refine), check_strength(parameters.strength)
        self._check_encodes("refine", refine > 0)
        self._check_encodes("strength", strength < 1)
        mode, ratios = MODES[parameters.mode], parameters.ratios
        with watch.measure("read"):
            assert placement.reference is not None
            read = load_views(placement, limits.pixels)
            target = load_target(placement.box, placement.mask, scene, limits.pixels, placement.keep_specks)
        with watch.measure("prepare"):
            reference, *others = [self._reference(picture, mask, ratios) for picture, mask in read]
            hint, key = self._hint(scene, target, reference, ratios, mode)
            fade = self._fade(hint.geometry, mode) if soft else None
            views = [each.image for each in (reference, *others)]
            region = (
                pasted_region(hint.geometry, mode.paste)
                if fade is None
                else feathered_region(hint.geometry, fade)
            )
            pixels = object_pixels(*read[0], self._resolution) if strength < 1 else None
            start = self._start(scene, hint.geometry, target, pixels)
            place = AnyDoorPlacement(
                *(reference, views, target, mode, ratios, hint, key, fade, pixels), region=region, start=start
            )
            tiles = self._tiles(place, *read[0], (scene.shape[1], scene.shape[0])) if refine else ()
        sharper = "a smaller place is sharper"
        if self.encodes and not tiles:
            sharper += ", and so is one that is refined"
        drawn_last = tiles[-1].geometry if tiles else hint.geometry
        warn_of_enlargement(drawn_last, (self._resolution, self._resolution), sharper)
        return replace(place, tiles=tiles)

    def _check_encodes(self, name: str, is_needed: bool) -> None:
        if is_needed and not self.encodes:
            with in_field(name):
                raise InputError(
                    f"this bundle was built without the graph that encodes pictures, which {name} needs: "
                    "build it again"
                )

    def _start(
        self,
        scene: NDArray[np.uint8],
        geometry: Geometry,
        target: Box | NDArray[np.bool_],
        pixels: NDArray[np.uint8] | None,
    ) -> NDArray[np.float32] | None:
        """Returns what sampling starts from: the object in its place, if it is given."""
        if pixels is None:
            return None
        pasted = paste_object(scene, geometry, place_of(target), pixels)
        return to_network(pasted, geometry.padding, self._resolution)

    def _tiles(
        self,
        place: AnyDoorPlacement,
        picture: NDArray[np.uint8],
        mask: NDArray[np.bool_],
        scene_size: tuple[int, int],
    ) -> tuple[AnyDoorTile, ...]:
        """Covers a place with tiles, unless the networks' picture is as large as what they see of it.

        Args:
            place: what is refined.
            picture: of the reference, (H, W, 3).
            mask: of the object in it, (H, W).
            scene_size: (width, height).
        """
        whole, ratio = place.hint.geometry, place.ratios.reference
        if max(whole.padded_size) <= self._resolution:
            return ()
        boxes = tiles_of(place.region, scene_size, self._resolution)
        scale = self._resolution / max(boxes[0].width, boxes[0].height)
        shown = round(max(whole.box.width, whole.box.height) * scale)
        # a reference that is smaller has no more details than it has
        side = max(min(shown, square_side(mask, ratio)), self._reference_size)
        details = prepare_reference(picture, mask, ratio, side).high_frequency_map
        return tuple(
            AnyDoorTile(
                place, Geometry(box, whole.box), details, region=place.region.intersection(box), is_tile=True
            )
            for box in boxes
        )

    def _reference(
        self, picture: NDArray[np.uint8], mask: NDArray[np.bool_], ratios: Ratios
    ) -> PreparedReference:
        # nothing else of a large picture is looked at
        crop = bounding_box(mask).slices
        return self._references.get(
            digest(picture[crop], mask[crop], repr(ratios.reference)),
            lambda: prepare_reference(picture, mask, ratios.reference, self._reference_size),
        )

    def renew(
        self, prepared: AnyDoorPlacement | AnyDoorTile, scene: NDArray[np.uint8], watch: Stopwatch
    ) -> AnyDoorPlacement | AnyDoorTile:
        """Returns the same placement in another scene of the same size, or a tile of it."""
        p = prepared
        with watch.measure("prepare"):
            if isinstance(p, AnyDoorTile):
                hint = Hint(self._tile_hint(p, scene), p.geometry)
                return replace(p, hint=hint, start=crop_scene(scene, p.geometry, self._resolution))
            hint, key = self._hint(scene, p.target, p.reference, p.ratios, p.mode)
            start = self._start(scene, hint.geometry, p.target, p.pixels)
        return replace(p, hint=hint, hint_key=key, start=start)

    def _tile_hint(self, tile: AnyDoorTile, scene: NDArray[np.uint8]) -> NDArray[np.float32]:
        place, box = tile.place, tile.geometry.crop
        whole = place.hint.geometry
        both = box.intersection(whole.crop)
        mask = np.zeros((box.height, box.width), np.uint8)
        of_place = shape_mask(place.target, whole, place.mode)
        mask[box_in_box(both, box).slices] = of_place[box_in_box(both, whole.crop).slices]
        return collage(scene, tile.geometry, tile.details, mask, place.mode, self._resolution)

    def _hint(
        self,
        scene: NDArray[np.uint8],
        target: Box | NDArray[np.bool_],
        reference: PreparedReference,
        ratios: Ratios,
        mode: Mode,
    ) -> tuple[Hint, bytes]:
        """Returns the hint, which another seed for the same placement needs again, and its key."""
        geometry = zoom_in(target, (scene.shape[1], scene.shape[0]), ratios)
        mask = shape_mask(target, geometry, mode)
        seen = (scene[geometry.crop.slices], mask, reference.high_frequency_map)
        key = digest(*seen, repr((geometry, mode)))
        return (
            self._hints.get(key, lambda: hint_at(geometry, scene, mask, reference, mode, self._resolution)),
            key,
        )

    def _fade(self, geometry: Geometry, mode: Mode) -> NDArray[np.float32]:
        """Returns the opacity with which a picture is pasted; the crop's edge always fades."""
        kept = geometry.box if mode.paste.keep_background else geometry.crop
        return feathered_box(kept, geometry, (self._resolution, self._resolution))

    def forget(self) -> None:
        """Drops references and hints that are kept for re-rolls."""
        self._references.clear()
        self._hints.clear()

    def finish(
        self,
        picture: NDArray[np.uint8],
        scene: NDArray[np.uint8],
        prepared: AnyDoorPlacement | AnyDoorTile,
    ) -> NDArray[np.uint8]:
        """Pastes the picture back by the rule of the placement's mode, or faded."""
        if isinstance(prepared, AnyDoorTile):
            place = prepared.place
            whole = place.hint.geometry
            return paste_tile(picture, scene, prepared.geometry, place.region, whole, place.fade)
        if prepared.fade is not None:
            return paste_feathered(picture, scene, prepared.hint.geometry, prepared.fade)
        return paste_back(picture, scene, prepared.hint.geometry, prepared.mode.paste)


class AnyDoor(Preprocessing):
    """The system with a model; see `runtime.systems.system.System`."""

    defaults: Mapping[str, Any] = DEFAULTS

    def __init__(self, model: Model) -> None:
        """Looks up what the model has.

        Raises:
            BundleError: a graph or a constant is missing.
        """
        manifest = model.bundle.manifest
        missing = [graph for graph in (ID_ENCODER, CONTROL) if graph not in manifest.graphs]
        if missing:
            raise BundleError(f"the bundle at '{model.bundle.path}' has no graph '{missing[0]}'")
        self._engine = model.engine
        self._tokens = ReferenceTokens(
            model.engine, manifest.specs[ID_ENCODER], manifest.step, manifest.typical_sizes
        )
        self.abilities = replace(ABILITIES, views=self._tokens.views)
        super().__init__(manifest.resolution, self._tokens.side)
        no_reference = model.constant("unconditional_tokens", self._tokens.shape)
        self._unconditional_tokens = self._tokens.repeated(no_reference)
        self._window = model.control_window
        self.encodes = manifest.encoder is not None
        if not self.encodes:
            self.defaults = {
                name: v for name, v in self.defaults.items() if name not in ("refine", "strength")
            }
        self.cache = DetailMapCache(model.cache_bytes)
        """Detail maps that are kept for re-rolls."""

    def conditions(
        self,
        prepared: AnyDoorPlacement | AnyDoorTile,
        sampling: SamplingParameters,
        schedule: Schedule,
        watch: Stopwatch,
    ) -> AnyDoorConditions:
        """Encodes the reference, unless its ID tokens are remembered; detail maps are computed when
        needed."""
        # detail maps of tiles are not reused for another seed
        keeps = not isinstance(prepared, AnyDoorTile)
        place = prepared.place if isinstance(prepared, AnyDoorTile) else prepared
        assert prepared.hint is not None
        tokens = self._tokens.of_views(place.views, watch)
        guided = guided_steps(sampling, schedule)
        if any(guided):
            tokens = np.concatenate([tokens, self._unconditional_tokens])
        timesteps = shared_timesteps(schedule.timesteps.tolist(), sampling.map_steps)
        maps = DetailMaps(
            self._engine,
            CONTROL,
            self.cache,
            prepared.hint.hint,
            tokens,
            timesteps,
            self._window,
            guided,
            place.hint_key if keeps else None,
            keeps=keeps,
        )
        return AnyDoorConditions(BankRows({"tokens": tokens}, 0, len(tokens) - 1, on_host=True), maps)

    def kept_bytes(self) -> int:
        """Returns memory of the detail maps that are kept."""
        return self.cache.nbytes

    def clear(self) -> None:
        """Drops detail maps, ID tokens, references and hints."""
        self.forget()
        self.cache.clear()
        self._tokens.kept.clear()


def create(model: Model) -> AnyDoor:
    """Returns the system at work with a model."""
    return AnyDoor(model)
