"""Finds objects in pictures, by networks or by a rule for plain backgrounds."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.bundle import Bundle
from engines.engine import Engine, open_engine
from engines.errors import BundleError
from engines.memory_plan import DeviceMemoryPlan
from engines.options import EngineOptions
from runtime.errors import InputError, MissingModelError, in_field
from runtime.imaging.boxes import SMALLEST_MASK_AREA, Box
from runtime.imaging.clicks import Click, check_clicks, require_inside
from runtime.imaging.decoding import MAX_PIXELS, UPRIGHT
from runtime.imaging.masks import MaskedPicture, load_mask, mask_from_alpha
from runtime.imaging.picture import Picture
from runtime.imaging.pictures import load_picture, seen
from runtime.imaging.plain_background import cut_from_plain
from runtime.imaging.sources import PictureLike
from runtime.imaging.specks import large_pieces
from runtime.imaging.target import check_box
from runtime.request import Placement, Request, View, Where, is_automatic
from runtime.result import Found, Stopwatch
from runtime.validation import in_placement

SALIENT, EMBED, CLICK = "salient", "embed", "click"
"""Names of segmenters' graphs."""

_ON, _OFF, _FIRST_CORNER, _LAST_CORNER, _NO_POINT = 1, 0, 2, 3, -1
"""Labels of points."""

_OPTION = "--segmenter"

_MOST_OPAQUE = 0.9
"""A picture of which a larger share is opaque is no cut-out but one with rounded corners or a hole."""


class Segmenter:
    """Finds objects in pictures. Threads may share a segmenter; its networks serve one at a time.

    segmenter = Segmenter.load("build/engines/u2net", "build/engines/sam")
    mask = segmenter.mask("desk.jpg", clicks=[(120, 80)])

    Without networks it cuts objects out of plain backgrounds.
    """

    def __init__(self, *networks: tuple[Bundle, Engine]) -> None:
        """Wraps opened bundles and the engines that run them; `load` is the usual way.

        Raises:
            BundleError: a bundle is not a segmenter, or two find the same.
        """
        self._lock = threading.Lock()
        self._networks: dict[str, tuple[Bundle, Engine]] = {}
        for bundle, engine in networks:
            graphs = bundle.manifest.graphs
            kind = SALIENT if SALIENT in graphs else CLICK
            if kind not in graphs:
                raise BundleError(
                    f"the bundle at '{bundle.path}' is not a segmenter: build one from an .onnx file, "
                    "like 'anydoor build u2net.onnx'"
                )
            if kind in self._networks:
                both = f"'{self._networks[kind][0].path}' and '{bundle.path}'"
                what = "the main object" if kind == SALIENT else "what is clicked on"
                raise BundleError(f"the segmenters {both} both find {what}: give only one of them")
            self._networks[kind] = bundle, engine

    @classmethod
    def load(
        cls,
        *paths: str | Path,
        options: EngineOptions = EngineOptions(),
        trusted_key: str | Path | None = None,
    ) -> Segmenter:
        """Opens bundles: one that finds the main object, one for clicks, both, or none.

        Args:
            paths: directories that `anydoor build` wrote.
            options: where and how the graphs run.
            trusted_key: see `Compositor.load`.

        Raises:
            AnyDoorError: a bundle or its backend cannot be used; the message says why.
        """
        key = None if trusted_key is None else Path(trusted_key)
        opened = [Bundle.open(path, key) for path in paths]
        return cls(*((bundle, open_engine(bundle, options)) for bundle in opened))

    @property
    def takes_clicks(self) -> bool:
        """Whether it finds objects by clicks and boxes."""
        return CLICK in self._networks

    @property
    def finds_main_object(self) -> bool:
        """Whether a network finds the main object, on any background."""
        return SALIENT in self._networks

    @property
    def nbytes(self) -> int:
        """Returns the memory of its networks; see `engine_bytes`."""
        return sum(engine_bytes(bundle, engine) for bundle, engine in self._networks.values())

    def load_graphs(self) -> None:
        """Loads all graphs ahead of the first picture."""
        for bundle, engine in self._networks.values():
            for graph in bundle.manifest.graphs:
                engine.load(graph)

    def beside(self, options: EngineOptions) -> EngineOptions:
        """Returns the options for another engine that shares the memory budget."""
        return beside(options, self.nbytes)

    def check(self, where: Where) -> None:
        """Checks, before anything is decoded, that the object can be found.

        Raises:
            MissingModelError: a network for clicks is needed, but none is loaded.
            InputError: box, mask and clicks are combined, a click is invalid, or none is on the object.
        """
        if sum(given is not None for given in vars(where).values()) > 1:
            raise InputError("give only one of box, mask and clicks to select the object")
        if where.clicks is not None:
            with in_field("clicks"):
                check_clicks(where.clicks)
                self.require_clicks()
        if where.box is not None:
            with in_field("box"):
                self.require_clicks()

    def find(
        self, picture: Picture, where: Where, max_pixels: int = MAX_PIXELS, name: str = "the picture"
    ) -> Found:
        """Finds an object in an upright picture; see `segment`. Call `check` before."""
        if where.mask is not None:
            with in_field("mask"):
                of = MaskedPicture(name, picture.rgb.shape, picture.orientation)
                return Found(load_mask(where.mask, "the mask", max_pixels, of))
        selected = "clicks" if where.clicks is not None else "box" if where.box is not None else ""
        with in_field(selected) if selected else nullcontext():
            return self.segment(picture, where.clicks, where.box, max_pixels, name)

    def mask(
        self,
        picture: PictureLike,
        clicks: Sequence[Sequence[int]] | None = None,
        box: Sequence[float] | None = None,
        max_pixels: int = MAX_PIXELS,
        name: str = "the picture",
    ) -> NDArray[np.bool_]:
        """Returns the mask (H, W) of an object; see `segment`."""
        return self.segment(picture, clicks, box, max_pixels, name).mask

    def segment(
        self,
        picture: PictureLike,
        clicks: Sequence[Sequence[int]] | None = None,
        box: Sequence[float] | None = None,
        max_pixels: int = MAX_PIXELS,
        name: str = "the picture",
    ) -> Found:
        """Finds an object by clicks or a box, else the main object; returns its mask, and the score of one
        that was found by clicks or a box.

        In a picture of which more than a tenth is transparent, the main object is what is opaque.

        Args:
            picture: the picture.
            clicks: (x, y) on the object, or (x, y, False) for points that are not on it.
            box: x0, y0, x1, y1 around the object.
            max_pixels: a larger picture is refused before it is decoded.
            name: name of the picture in errors.

        Raises:
            MissingModelError: a network that is needed is not loaded.
            InputError: the picture, a click or the box is invalid, or nothing is found.
        """
        loaded = load_picture(picture, name, max_pixels)
        if clicks is None and box is None:
            found, where = Found(self._main_object(loaded, name)), f"in {name}"
        else:
            found, where = self._clicked(seen(loaded), clicks, box, name), "there"
        if np.count_nonzero(found.mask) < SMALLEST_MASK_AREA:
            raise InputError(f"no object was found {where}: give a mask, or other clicks")
        return found

    def _main_object(self, picture: Picture, name: str) -> NDArray[np.bool_]:
        if picture.alpha is not None:
            opaque = mask_from_alpha(picture.alpha)
            if 0 < opaque.mean() < _MOST_OPAQUE:
                return opaque
        rgb = seen(picture)
        if SALIENT in self._networks:
            bundle, engine = self._networks[SALIENT]
            view = _View(rgb, bundle.manifest.resolution, keeps_proportions=False)
            with self._lock:
                mask = engine.to_host(engine.run(SALIENT, {"picture": view.picture})["mask"])
            return large_pieces(view.to_picture(mask[0, 0]) > 0.5)
        found = cut_from_plain(rgb)
        if found is None:
            raise MissingModelError(
                f"the background of {name} is not plain, and other backgrounds need a segmenter: give a "
                f"mask, transparency, or {_OPTION} BUNDLE"
            )
        return found

    def _clicked(
        self,
        rgb: NDArray[np.uint8],
        clicks: Sequence[Sequence[int]] | None,
        box: Sequence[float] | None,
        name: str,
    ) -> Found:
        size = (rgb.shape[1], rgb.shape[0])
        checked = [] if clicks is None else check_clicks(clicks)
        require_inside(checked, size, name)
        around = None if box is None else check_box(box, size).clip(size)
        bundle, engine = self.require_clicks()
        has_inside = len(bundle.manifest.specs[EMBED].inputs) > 1
        view = _View(rgb, bundle.manifest.resolution, keeps_proportions=has_inside)
        points, labels = view.points(checked, around)
        with self._lock:
            features = engine.run(EMBED, view.inputs)
            found = engine.run(CLICK, {**features, "points": points, "labels": labels})
            masks, scores = (engine.to_host(found[output]) for output in ("masks", "scores"))
        best = scores[0].argmax()
        return Found(view.to_picture(masks[0, best]) > 0, float(scores[0, best]))

    def require_clicks(self) -> tuple[Bundle, Engine]:
        """Returns the network for clicks.

        Raises:
            MissingModelError: none is loaded; the message names the option.
        """
        if CLICK not in self._networks:
            raise MissingModelError(
                "no segmenter for clicks and boxes is loaded: give a mask, or the bundle of one, like SAM, "
                f"with {_OPTION} BUNDLE"
            )
        return self._networks[CLICK]


def engine_bytes(bundle: Bundle, engine: Engine) -> int:
    """Returns the memory that a bundle takes: on a card as planned, else that of its graphs and their
    intermediate results."""
    plan = getattr(engine, "plan", None)
    if isinstance(plan, DeviceMemoryPlan):
        return plan.total
    records = bundle.manifest.graphs.values()
    return sum(record.nbytes + max(record.scratch_bytes.values(), default=0) for record in records)


def beside(options: EngineOptions, nbytes: int) -> EngineOptions:
    """Returns the options of an engine that leaves so many bytes of its memory budget to others."""
    if options.memory_budget is None:
        return options
    return replace(options, memory_budget=max(1, options.memory_budget - nbytes))


class _View:
    """Scales a picture to a network's input, and masks back."""

    def __init__(self, rgb: NDArray[np.uint8], side: int, keeps_proportions: bool) -> None:
        """Scales (H, W, 3) to a square of `side` pixels: stretched, or padded on the right or below."""
        height, width = rgb.shape[:2]
        self._size = width, height
        self._side = self._width = self._height = side
        if keeps_proportions:
            scale = side / max(width, height)
            self._width, self._height = max(1, round(width * scale)), max(1, round(height * scale))
        resized = Image.fromarray(rgb).resize((self._width, self._height), Image.Resampling.BILINEAR)
        values = (np.asarray(resized, np.float32) / 255).transpose(2, 0, 1)
        self.picture = np.zeros((1, 3, side, side), np.float32)
        """(1, 3, S, S), 0..1."""
        self.picture[0, :, : self._height, : self._width] = values
        self._keeps_proportions = keeps_proportions

    @property
    def inputs(self) -> dict[str, NDArray[np.float32]]:
        """Returns the inputs of the graph that takes the picture."""
        if not self._keeps_proportions:
            return {"picture": self.picture}
        inside = np.zeros((1, 1, self._side, self._side), np.float32)
        inside[..., : self._height, : self._width] = 1
        return {"picture": self.picture, "inside": inside}

    def points(
        self, clicks: Sequence[Click], box: Box | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Returns points (1, N, 2) and labels (1, N); without a box, a padding point follows, as SAM's
        decoder requires."""
        scale = np.array([self._width / self._size[0], self._height / self._size[1]], np.float32)
        points = [(click.x, click.y) for click in clicks]
        labels = [_ON if click.inside else _OFF for click in clicks]
        if box is None:
            points, labels = [*points, (0, 0)], [*labels, _NO_POINT]
        else:
            points = [*points, (box.x0, box.y0), (box.x1, box.y1)]
            labels = [*labels, _FIRST_CORNER, _LAST_CORNER]
        return np.array([points], np.float32) * scale, np.array([labels], np.float32)

    def to_picture(self, plane: NDArray[Any]) -> NDArray[np.float32]:
        """Scales a plane (s, s) of the square to the picture's size."""
        image = Image.fromarray(np.ascontiguousarray(plane, np.float32))
        # the picture may end within a cell
        cells = plane.shape[0] / self._side
        part = (0, 0, cells * self._width, cells * self._height)
        return np.asarray(image.resize(self._size, Image.Resampling.BILINEAR, box=part))


def check_segmenter(request: Request, segmenter: Segmenter) -> None:
    """Checks, before anything is decoded, that the objects of references can be found.

    Raises:
        InputError: an object cannot be found; the message names the placement.
    """
    for index, placement in enumerate(request.placements):
        given = {"reference_clicks": placement.reference_clicks}
        given |= {f"views[{i}].clicks": view.clicks for i, view in enumerate(placement.views or ())}
        for name, clicks in given.items():
            if clicks is not None:
                with in_placement(request, index), in_field(name):
                    check_clicks(clicks)
                    segmenter.require_clicks()


def cut_out(placement: Placement, segmenter: Segmenter, max_pixels: int, watch: Stopwatch) -> Placement:
    """Finds the object of a placement if that is requested; returns the placement with masks.

    Args:
        placement: the caller's placement.
        segmenter: finds it.
        max_pixels: of the reference, and of each view.
        watch: records the time of the stages read and segment.

    Raises:
        InputError: a picture cannot be read, or no object was found in it.
    """

    def found(given: View, names: tuple[str, str, str], title: str) -> View:
        if given.clicks is None and not is_automatic(given.mask):
            return given
        of_picture, of_mask, of_clicks = names
        with in_field(of_picture), watch.measure("read"):
            picture: Picture = load_picture(given.picture, title, max_pixels)
        with in_field(of_mask if given.clicks is None else of_clicks), watch.measure("segment"):
            mask = segmenter.mask(picture, given.clicks, name=title)
        # the mask is upright, as the picture is
        return View(replace(picture, orientation=UPRIGHT), mask)

    views = []
    for index, view in enumerate(placement.views or ()):
        with in_field(f"views[{index}]"):
            views.append(found(view, ("picture", "mask", "clicks"), "the view"))
    placement = replace(placement, views=views or None)
    if placement.reference is None:
        return placement
    given = View(placement.reference, placement.reference_mask, placement.reference_clicks)
    first = found(given, ("reference", "reference_mask", "reference_clicks"), "the reference")
    return replace(
        placement, reference=first.picture, reference_mask=first.mask, reference_clicks=first.clicks
    )
