"""How good are the composites? Measures them against the truth, or as the paper does, beside baselines.

    python benchmarks/fidelity.py
    python benchmarks/fidelity.py --bundle examples/anydoor-small --bundle build/engines/imprint-small
    python benchmarks/fidelity.py --scene-size 480 --refine 0 --refine 400 --count 30
    python benchmarks/fidelity.py --protocol testset --dino dino-vits16 --clip clip-vit-base-patch32

By default on the synthetic set, whose true pictures are known (support/truth_set.py): SSIM and PSNR in the
object's box, gradient similarity in its mask (support/similarity.py), masked patch similarity to the
reference (support/patch_similarity.py), and whether a descriptor of colours and edges (support/identity.py)
recognises the object among twenty; of any number of bundles.
With --protocol: DINO-score and CLIP-score over objects x scenes, in a folder as support/protocol.py
describes. Prints a table; writes fidelity.json and a contact sheet, pairs.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmarks.support import fidelity_protocol, fidelity_truth
from benchmarks.support.bundle_option import EXAMPLE_BUNDLE
from benchmarks.support.example import CHECKPOINT, example_checkpoint
from benchmarks.support.machine import describe
from benchmarks.support.patch_similarity import load_dinov2, own_dinov2
from benchmarks.support.protocol import ProtocolObject, read_protocol
from benchmarks.support.results import require_writable, write_results
from benchmarks.support.truth_set import TruthPair
from engines.errors import AnyDoorError
from runtime import Compositor, Placement, Request, Sampling
from runtime.cli.flags import add_engine_flags, engine_options
from runtime.diffusion.presets import QUALITIES
from runtime.errors import InputError
from runtime.imaging.boxes import Box
from runtime.imaging.modes import MODES
from training.data.synthetic.views import VIEW_SIZE

Picture = NDArray[np.uint8]

EXAMPLES = """examples:
  python benchmarks/fidelity.py
  python benchmarks/fidelity.py --bundle examples/anydoor-small --bundle build/engines/imprint-small
  python benchmarks/fidelity.py --strength 1 --strength 0.65 --strength 0.5
  python benchmarks/fidelity.py --bundle build/engines/anydoor --steps 20 --guidance-scale 5 --count 30
  python benchmarks/fidelity.py --protocol testset --dino dino-vits16 --clip clip-vit-base-patch32
"""

_HEADING_LETTERS = 18
"""Most letters in a line above a column."""


class Composer:
    """Composites with one bundle and the settings of the command line."""

    def __init__(self, bundle: Path, options: argparse.Namespace) -> None:
        self.compositor = Compositor.load(bundle, engine_options(options))
        self.sampling = Sampling(options.quality, options.steps, options.guidance_scale)
        self.mode, self.seed = options.mode, options.seed
        self.crop_ratio = options.crop_ratio

    @property
    def system(self) -> str:
        """The system that the bundle is a model of."""
        return self.compositor.system.abilities.title

    def settings(self, options: argparse.Namespace) -> dict[str, Any]:
        """Return what the composites were made with."""
        names = ("quality", "steps", "guidance_scale", "crop_ratio", "mode", "seed")
        given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
        defaults = self.compositor.defaults
        found = {name: defaults[name] for name in names if name in defaults} | given
        return {**found, "checkpoint": dict(self.compositor.bundle.manifest.checkpoint)}

    def draw(self, scene: Picture, placement: Placement, number: int) -> Picture:
        """Return the composite; every pair has its own noise."""
        placement = replace(placement, crop_ratio=self.crop_ratio)
        request = Request(scene, [placement], self.seed + number, self.sampling)
        return self.compositor.run(request)[0].image

    def truth_pair(self, pair: TruthPair, number: int, **parameters: float | None) -> Picture:
        """Return the scene of a pair with its object; `parameters` are those of the placement."""
        placement: Placement = replace(pair.placement(self.mode), **parameters)  # type: ignore[arg-type]
        return self.draw(pair.guessed, placement, number)

    def protocol_pair(self, each: ProtocolObject, scene: Picture, box: Box, number: int) -> Picture:
        """Return a scene with an object of the paper's protocol."""
        image, alpha = each.reference
        place = (box.x0, box.y0, box.x1, box.y1)
        return self.draw(scene, Placement(image, alpha, box=place, mode=self.mode), number)


def labelled_sheet(columns: Mapping[str, Sequence[Picture]], rows: int, gap: int = 6) -> Picture:
    """Lay pictures of one size out in columns under their headings, the first `rows` of each, on white."""
    height, width = next(iter(columns.values()))[0].shape[:2]
    shown = min(rows, *(len(pictures) for pictures in columns.values()))
    font = ImageFont.load_default(size=max(10, width // 11))
    headings = {column: "\n".join(wrap(column, _HEADING_LETTERS)) for column in columns}
    lines = max(heading.count("\n") for heading in headings.values()) + 1
    top = lines * round(font.getbbox("Ag")[3] + 4) + gap
    size = len(columns) * (width + gap) - gap, top + shown * (height + gap) - gap
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, (heading, pictures) in enumerate(columns.items()):
        left = column * (width + gap)
        at = left + width // 2, 0
        pen.multiline_text(at, headings[heading], fill="black", font=font, anchor="ma", align="center")
        for row, picture in enumerate(pictures[:shown]):
            sheet.paste(Image.fromarray(picture), (left, top + row * (height + gap)))
    return np.asarray(sheet)


def check(options: argparse.Namespace) -> None:
    """Refuse options that do not go together, before anything is loaded.

    Raises:
        InputError: they do not, and why.
    """
    scored = options.dino or options.clip
    if options.protocol and not scored:
        raise InputError("--protocol needs --dino FOLDER, --clip FOLDER, or both")
    if scored and not options.protocol:
        raise InputError("--dino and --clip score the paper's protocol: give its folder with --protocol")
    if options.protocol and len(options.bundle or ()) > 1:
        raise InputError("--protocol measures one bundle: give one --bundle")
    if options.scene_size < 64:
        raise InputError(f"--scene-size is at least 64, not {options.scene_size}")
    if options.count < 1 or options.rows < 1 or options.among < 2:
        raise InputError("--count and --rows are at least 1, --among at least 2")


def load_composers(options: argparse.Namespace) -> dict[str, Composer]:
    """Open the bundles: name -> composer. Its system names one; of several with one system the folders do.

    Raises:
        AnyDoorError: a bundle cannot be used, or two folders have the same name.
    """
    opened = [(bundle, Composer(bundle, options)) for bundle in options.bundle or [EXAMPLE_BUNDLE]]
    systems = [composer.system for _, composer in opened]
    composers = {
        composer.system if systems.count(composer.system) == 1 else bundle.resolve().name: composer
        for bundle, composer in opened
    }
    if len(composers) < len(opened):
        raise InputError("two bundles have folders of the same name, and the table could not tell them apart")
    return composers


def _row(name: str, refine: int | None, strength: float | None) -> str:
    refined = f", refined from {refine}" if refine else ""
    return name + refined + (f", strength {strength:g}" if strength not in (None, 1) else "")


def measure(
    options: argparse.Namespace, composers: Mapping[str, Composer]
) -> fidelity_truth.TruthReport | fidelity_protocol.ProtocolReport:
    """Run what the command line asks for.

    Raises:
        AnyDoorError: a folder or a setting cannot be used.
    """
    if not options.protocol:
        patches = load_dinov2(options.dinov2) if options.dinov2 else own_dinov2(example_checkpoint())
        settings = list(product(options.refine or [None], options.strength or [None]))
        models = {
            _row(name, refine, strength): partial(composer.truth_pair, refine=refine, strength=strength)
            for name, composer in composers.items()
            for refine, strength in settings
        }
        return fidelity_truth.measure(models, options.count, patches, options.among, options.scene_size)
    # the packages of the embedding networks are not needed otherwise
    from benchmarks.support.embeddings import load_clip, load_dino

    objects, scenes = read_protocol(options.protocol)
    loaders = ((load_dino, options.dino), (load_clip, options.clip))
    embedders = [load(folder) for load, folder in loaders if folder]
    ((name, composer),) = composers.items()
    return fidelity_protocol.measure(name, composer.protocol_pair, objects, scenes, embedders)


def write_report(
    report: fidelity_truth.TruthReport | fidelity_protocol.ProtocolReport,
    settings: Mapping[str, Any],
    folder: Path,
    rows: int,
) -> None:
    """Write fidelity.json and pairs.png."""
    content = {"machine": describe(), "settings": settings, **report.content()}
    write_results(folder / "fidelity.json", content)
    Image.fromarray(labelled_sheet(report.columns(), rows)).save(folder / "pairs.png", optimize=True)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="fidelity.py",
        description="Measure how good composites are, beside doing nothing and copy-paste.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--bundle",
        type=Path,
        action="append",
        metavar="DIR",
        help=f"may be repeated, for models side by side (default: {EXAMPLE_BUNDLE})",
    )
    result.add_argument("--steps", type=int, default=20, metavar="N", help="default: %(default)s")
    result.add_argument("--guidance-scale", type=float, metavar="G", help="default: the model's")
    result.add_argument(
        "--quality",
        choices=tuple(QUALITIES),
        help="preset of all sampling parameters but steps (default: the model's)",
    )
    result.add_argument(
        "--crop-ratio",
        type=float,
        metavar="R",
        help="zoom-in crop around the box; the example model learned 1.2 to 1.6 (default: the model's)",
    )
    result.add_argument(
        "--strength",
        type=float,
        action="append",
        metavar="S",
        help="share of noise to start from, below 1 from the pasted object; repeated, one row each "
        "(default: the model's)",
    )
    result.add_argument(
        "--scene-size",
        type=int,
        default=VIEW_SIZE,
        metavar="N",
        help="side of the synthetic set's pictures, in pixels (default: %(default)s)",
    )
    result.add_argument(
        "--refine",
        type=int,
        action="append",
        metavar="TIMESTEP",
        help="draw large places a second time, from noise of this timestep; 0: not; repeated, one row each",
    )
    result.add_argument("--mode", choices=MODES, help="default: the model's")
    result.add_argument("--seed", type=int, default=7, metavar="S", help="of the first pair (default: 7)")
    result.add_argument(
        "--count", type=int, default=100, metavar="N", help="pairs of the synthetic set (default: 100)"
    )
    result.add_argument(
        "--among",
        type=int,
        default=20,
        metavar="N",
        help="objects that one is recognised among (default: 20)",
    )
    result.add_argument(
        "--protocol", type=Path, metavar="DIR", help="objects and scenes of the paper's protocol"
    )
    result.add_argument(
        "--dinov2",
        type=Path,
        metavar="DIR",
        help="weights of DINOv2 (transformers) for the patch similarity (default: the small one of "
        f"{CHECKPOINT})",
    )
    result.add_argument("--dino", type=Path, metavar="DIR", help="weights of DINO ViT-S/16 (transformers)")
    result.add_argument("--clip", type=Path, metavar="DIR", help="weights of CLIP ViT-B/32 (transformers)")
    result.add_argument(
        "--output", type=Path, default=Path("build/fidelity"), metavar="DIR", help="default: %(default)s"
    )
    result.add_argument(
        "--rows", type=int, default=6, metavar="N", help="of the contact sheet, the first pairs (default: 6)"
    )
    add_engine_flags(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 if something cannot be used."""
    options = parser().parse_args(arguments)
    try:
        check(options)
        require_writable(options.output / "fidelity.json")
        composers = load_composers(options)
        report = measure(options, composers)
        settings = {name: composer.settings(options) for name, composer in composers.items()}
        write_report(report, settings, options.output, options.rows)
    except (AnyDoorError, OSError) as error:
        print(f"fidelity.py: {error}", file=sys.stderr)
        return 2
    print(report.table())
    print(f"{options.output / 'fidelity.json'}, {options.output / 'pairs.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
