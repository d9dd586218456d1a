"""What keeps the example model from better pictures: how far off is what it expects to see?

    python benchmarks/studies/latent_errors.py
    python benchmarks/studies/latent_errors.py --first 0 --output build/trained-objects.json
    python benchmarks/studies/latent_errors.py --same --output build/same-picture.json
    python benchmarks/studies/latent_errors.py --checkpoint FILE --checkpoint OTHER

At a timestep t, a network that predicts the noise also tells what it takes for the clean latent (DDIM, Song
et al., 2021, equation 9). The study measures the mean squared error of that estimate against the latent of
the true picture, in units of the latents (variance about 1), apart for the cells of the object, of the
background that is hidden in the box, and of the scene outside of it. At t = 999 there is nothing but noise,
so the estimate is what the network makes of reference and scene alone. With `--same` the reference is cut out
of the true picture: then nothing is left to guess, and what remains is what the network fails to carry over.

It is compared with two pictures that need no network, copy-paste and the guessed background, and with a
linear function: least squares from the reference's nine DINOv2 tokens around the matching place, and from
the hint block, to the latent of a cell. That function is fitted to pairs of other objects. A network that
does no better has not learned to look at more than one place. The function knows the places by
`training.data.matching_places`, so only boxes that lie wholly inside the picture count for it.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.support.baselines import copy_paste
from benchmarks.support.example import CHECKPOINT, example_checkpoint
from benchmarks.support.machine import describe
from benchmarks.support.numbers import positive
from benchmarks.support.results import RESULTS, require_writable, write_results
from benchmarks.support.truth_set import TruthPair, truth_pairs
from engines.errors import AnyDoorError
from export.systems.anydoor import AnyDoorSource
from runtime.errors import InputError
from runtime.imaging.collage import crop_scene
from runtime.imaging.geometry import Geometry, Ratios, zoom_in
from runtime.progress_bar import ProgressBar
from training.data.matching_places import matching_places
from training.data.pairs import Pair, PairRules, Shot, as_reference, make_pair
from training.data.synthetic.views import HELD_OUT
from training.network.architecture import LATENT_SCALE
from training.network.checkpoint import network_of, read_checkpoint
from training.network.checkpoint_file import CheckpointError
from training.network.modules import AnyDoor

TIMESTEPS = (999, 900, 700, 500, 300)
REGIONS = ("object", "background in the box", "outside")

_RATIOS = Ratios(reference=1.2, box=1.1, crop=1.3)
_INSIDE = 128
_FITTED = 900_000
"""First object of the linear function: neither held out nor one of a training."""
_RIDGE = 30.0
"""Weight of the squared coefficients of the linear function, whose inputs have variance 1."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A pair as the network sees it."""

    pair: Pair
    truth: Tensor
    """Latent of the true picture, (C, h, w)."""
    baselines: dict[str, Tensor]
    """Name -> latent of a picture that needs no network."""
    regions: dict[str, Tensor]
    """Region -> its cells, (h, w) bool."""


class Errors:
    """Sums squared errors by row and region."""

    def __init__(self) -> None:
        self._sums: defaultdict[tuple[str, str], NDArray[np.float64]] = defaultdict(lambda: np.zeros(2))

    def add(self, row: str, found: Tensor, truth: Tensor, regions: dict[str, Tensor]) -> None:
        """Adds the errors of a latent (C, h, w)."""
        squares = (found - truth).square().mean(0)
        for region, cells in regions.items():
            self._sums[row, region] += (float(squares[cells].sum()), int(cells.sum()))

    def means(self, row: str) -> dict[str, float | None]:
        """Returns the mean of every region; none where a row has no cells."""
        sums = {region: self._sums[row, region] for region in REGIONS}
        return {region: float(total / cells) if cells else None for region, (total, cells) in sums.items()}


def prepare(model: AnyDoor, pair: TruthPair, resolution: int) -> Prepared:
    """Makes a pair of what a method is given, always in the same way."""
    rules = PairRules(
        resolution,
        flip=0,
        brighten=0,
        box_masks=1,
        reference_ratios=(_RATIOS.reference, _RATIOS.reference),
        crop_ratios=(_RATIOS.crop, _RATIOS.crop),
    )
    mask = pair.target.mask > _INSIDE
    reference = Shot(pair.reference.image, pair.reference.mask > _INSIDE)
    # the kind whose boxes may be as large as those of the truth set
    made = make_pair(reference, Shot(pair.truth, mask), "try-on", rules, np.random.default_rng(0))
    geometry = zoom_in(mask, mask.shape[::-1], _RATIOS)
    truth = _latent(model, made.picture)
    pasted = copy_paste(pair.reference.image, pair.reference.mask, pair.guessed, pair.box)
    baselines = {"copy-paste, background guessed": pasted, "empty box, background guessed": pair.guessed}
    white = np.repeat(mask[..., None] * np.uint8(255), 3, 2)
    covered = _cells(crop_scene(white, geometry, resolution)[0] > 0, truth.shape[-1])
    box = _cells(made.hint[3] > 0, truth.shape[-1])
    return Prepared(
        made,
        truth,
        {name: _latent_of(model, picture, geometry, resolution) for name, picture in baselines.items()},
        dict(zip(REGIONS, (covered, box & ~covered, ~(box | covered)), strict=True)),
    )


def _latent_of(model: AnyDoor, picture: NDArray[np.uint8], geometry: Geometry, resolution: int) -> Tensor:
    return _latent(model, crop_scene(picture, geometry, resolution))


def _latent(model: AnyDoor, picture: NDArray[np.float32]) -> Tensor:
    mean: Tensor = model.encode(torch.from_numpy(picture)[None]).mean[0]
    return mean * LATENT_SCALE


def _cells(mask: NDArray[np.bool_], cells: int) -> Tensor:
    """Gives the cells that a mask (R, R) covers by more than a half."""
    return F.adaptive_avg_pool2d(torch.from_numpy(mask).float()[None], cells)[0] > 0.5


def estimate(model: AnyDoor, prepared: Prepared, timestep: int, seed: int) -> Tensor:
    """Gives what the network takes for the clean latent (C, h, w) when the true one is noised."""
    signal = model.alphas_cumprod[timestep]
    noise = np.random.default_rng(seed).standard_normal(tuple(prepared.truth.shape), np.float32)
    noisy = signal.sqrt() * prepared.truth + (1 - signal).sqrt() * torch.from_numpy(noise)
    tokens = model.encode_reference(torch.from_numpy(as_reference(prepared.pair.reference))[None])
    hint = torch.from_numpy(prepared.pair.hint)[None]
    predicted = model(noisy[None], torch.tensor([timestep]), tokens, hint)[0]
    clean: Tensor = (noisy - (1 - signal).sqrt() * predicted) / signal.sqrt()
    return clean


def neighbourhood(model: AnyDoor, prepared: Prepared) -> tuple[Tensor, Tensor]:
    """Gives the inputs (N, D) of the linear function, and which cells (h, w) they belong to."""
    cells = prepared.truth.shape[-1]
    reference = torch.from_numpy(as_reference(prepared.pair.reference))[None]
    features = model.id_encoder.features(reference)[:, 1:].transpose(1, 2)
    side = round(features.shape[2] ** 0.5)
    places = torch.from_numpy(matching_places(prepared.pair.hint[3] > 0, cells, side))
    known = places.isfinite().all(-1) & prepared.regions["object"]
    steps = torch.tensor([(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1)])
    around = places[known][:, None] + steps  # row and column
    grid = (around.flip(-1) / side * 2 - 1)[None]
    tokens = F.grid_sample(features.reshape(1, -1, side, side), grid, "bilinear", "border", False)
    hints = model.control.hint_features(torch.from_numpy(prepared.pair.hint)[None])[0]
    return torch.cat([tokens[0].permute(1, 2, 0).flatten(1), hints[:, known].T], 1), known


class LinearFunction:
    """Least squares from `neighbourhood` to the latents of cells."""

    def __init__(self, inputs: Tensor, latents: Tensor) -> None:
        """Fits it to inputs (N, D) and latents (N, C)."""
        self._mean, self._spread = inputs.mean(0), inputs.std(0) + 1e-6
        columns = self._columns(inputs)
        ridge = _RIDGE * torch.eye(columns.shape[1], dtype=columns.dtype)
        self._weights = torch.linalg.solve(columns.T @ columns + ridge, columns.T @ latents.double())

    def __call__(self, inputs: Tensor) -> Tensor:
        """Gives latents (N, C)."""
        latents: Tensor = (self._columns(inputs) @ self._weights).float()
        return latents

    def _columns(self, inputs: Tensor) -> Tensor:
        return F.pad((inputs - self._mean) / self._spread, (0, 1), value=1.0).double()


def fit(model: AnyDoor, pairs: Iterator[TruthPair], resolution: int) -> LinearFunction:
    """Fits the linear function to some pairs."""
    inputs, latents = [], []
    for pair in pairs:
        prepared = prepare(model, pair, resolution)
        found, known = neighbourhood(model, prepared)
        inputs.append(found)
        latents.append(prepared.truth[:, known].T)
    return LinearFunction(torch.cat(inputs), torch.cat(latents))


def chosen_pairs(options: argparse.Namespace, first: int, count: int) -> Iterator[TruthPair]:
    """Yields pairs, with the reference that the options ask for."""
    for pair in truth_pairs(count, first=first):
        yield replace(pair, reference=pair.target) if options.same else pair


@torch.no_grad()
def study(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures all rows."""
    loaded = {str(path): load_network(path, options.resolution) for path in options.checkpoint}
    if len(sides := sorted({side for _, side in loaded.values()})) > 1:
        raise InputError(f"the networks draw {sides} pixels: measure them apart, or give --resolution")
    (resolution,) = sides
    models = {name: model for name, (model, _) in loaded.items()}
    first = next(iter(models.values()))
    for name, model in models.items():
        if not _encode_alike(first, model):
            raise InputError(f"'{name}' has another autoencoder than the first checkpoint: measure it apart")
    fitted = None
    if options.fit:
        others = ProgressBar(chosen_pairs(options, _FITTED, options.fit), "fitting", total=options.fit)
        fitted = fit(first, iter(others), resolution)
    errors, names = Errors(), dict[str, None]()

    def add(row: str, found: Tensor, prepared: Prepared, regions: dict[str, Tensor]) -> None:
        names[row] = None
        errors.add(row, found, prepared.truth, regions)

    pairs = ProgressBar(
        chosen_pairs(options, options.first, options.count), "estimating", total=options.count
    )
    for seed, pair in enumerate(pairs):
        prepared = prepare(first, pair, resolution)
        add("nothing: zeros", torch.zeros_like(prepared.truth), prepared, prepared.regions)
        for name, latent in prepared.baselines.items():
            add(name, latent, prepared, prepared.regions)
        if fitted:
            inputs, known = neighbourhood(first, prepared)
            linear = torch.zeros_like(prepared.truth)
            linear[:, known] = fitted(inputs).T
            add("linear function", linear, prepared, {"object": known})
        for name, model in models.items():
            for timestep in TIMESTEPS:
                clean = estimate(model, prepared, timestep, seed)
                add(f"{name}, t = {timestep}", clean, prepared, prepared.regions)
    return [{"row": row, **errors.means(row)} for row in names]


def _encode_alike(one: AnyDoor, other: AnyDoor) -> bool:
    encoders = [
        {
            name: w
            for name, w in model.vae.state_dict().items()
            if name.startswith(("encoder.", "quant_conv."))
        }
        for model in (one, other)
    ]
    return encoders[0].keys() == encoders[1].keys() and all(
        torch.equal(weight, encoders[1][name]) for name, weight in encoders[0].items()
    )


def load_network(path: Path, resolution: int | None) -> tuple[AnyDoor, int]:
    """Builds the network of a checkpoint.

    Returns:
        The network, and the side of its pictures in pixels: as given, or as it was trained.

    Raises:
        CheckpointError: it cannot be used, or is of another system.
        InputError: it draws no pictures of that size.
    """
    checkpoint = read_checkpoint(path)
    network = network_of(checkpoint.architecture)
    if not isinstance(network, AnyDoor):
        raise CheckpointError(f"'{path}' is not an AnyDoor checkpoint")
    side = resolution or checkpoint.resolution or 512
    AnyDoorSource(checkpoint).check_size((side, side))
    network.load_official_state_dict(checkpoint.tensors)
    return network.eval(), side


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 if it cannot be run."""
    parser = argparse.ArgumentParser(
        prog="latent_errors.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, action="append", metavar="FILE", help=f"repeatable; default: {CHECKPOINT}"
    )
    parser.add_argument("--count", type=int, default=100, help="objects that are measured; default: 100")
    parser.add_argument(
        "--first",
        type=int,
        default=HELD_OUT,
        metavar="SEED",
        help="of the objects; below 1,000,000 are those of trainings (default: %(default)s, held out)",
    )
    parser.add_argument(
        "--fit", type=int, default=500, help="objects of the linear function; 0 leaves it out; default: 500"
    )
    parser.add_argument("--same", action="store_true", help="take the true picture as the reference")
    parser.add_argument(
        "--resolution", type=positive(int), help="of the networks; default: what they were trained for"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "latent-errors-small.json")
    options = parser.parse_args(arguments)
    try:
        if options.count < 1 or options.fit < 0 or options.first < 0:
            raise InputError("--count is at least 1, --fit and --first at least 0")
        require_writable(options.output)
        options.checkpoint = options.checkpoint or [example_checkpoint()]
        rows = study(options)
    except (AnyDoorError, OSError) as error:
        print(f"latent_errors.py: {error}", file=sys.stderr)
        return 2
    settings = {"count": options.count, "first": options.first, "fit": options.fit, "same": options.same}
    write_results(options.output, {"machine": describe(), "settings": settings, "rows": rows})
    for row in rows:
        print(f"{row['row']:<60}", *(f"{row[region] or float('nan'):.3f}" for region in REGIONS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
