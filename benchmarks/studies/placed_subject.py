"""Is a DreamBooth subject recognised where a server has put it into a scene by its prompt?

    python -m training.train training/recipes/stable-diffusion-inpainting-small.toml --minutes 15
    python -m training.train training/recipes/dreambooth-small.toml --folder runs/placed-mug \\
        --start runs/stable-diffusion-inpainting-small/model
    anydoor build runs/placed-mug/model.safetensors --output build/engines/placed-mug \\
        --tokenizer examples/stable-diffusion-small/tokenizer
    python benchmarks/studies/placed_subject.py build/engines/placed-mug --objects build/subjects

Starts `anydoor serve`, and places "a gzj CLASS" and, as a control, "a CLASS" into the box, both from the same
seeds. Each is recognised among the folders of --objects, called NAME-CLASS, by the descriptor of
`benchmarks/subject.py`, which is shown what the model has seen: the box and its surroundings. Outside the
region that the server names, every pixel has to be the scene's. Prints the shares, and writes a sheet of
pictures beside the results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.support.identity import Gallery
from benchmarks.support.machine import describe
from benchmarks.support.results import require_writable, write_results
from benchmarks.support.server_process import ServerProcess
from benchmarks.support.subject import object_gallery, recognised
from engines.errors import AnyDoorError
from engines.files import replacing
from runtime import Placement, Request, Sampling
from runtime.client import Client
from runtime.errors import InputError
from runtime.imaging.boxes import Box
from runtime.imaging.pictures import load_picture
from runtime.progress_bar import ProgressBar

Picture = NDArray[np.uint8]

SHOWN = 6
"""Pictures of each prompt in the sheet."""

_TIMEOUT = 600.0


@dataclass(frozen=True)
class Place:
    """Where a subject goes, and how it is drawn."""

    scene: Picture
    box: Box
    crop_ratio: float
    """Sides of what the model sees, in those of the box."""
    sampling: Sampling

    @property
    def seen(self) -> tuple[slice, slice]:
        """What the model sees, where it does not cross the scene's border."""
        more = [round(side * (self.crop_ratio - 1) / 2) for side in (self.box.height, self.box.width)]
        top, left = max(self.box.y0 - more[0], 0), max(self.box.x0 - more[1], 0)
        return slice(top, self.box.y1 + more[0]), slice(left, self.box.x1 + more[1])

    def requests(self, prompt: str, count: int) -> Iterator[Request]:
        """Yield a request for each of the seeds 0 to `count` - 1."""
        placement = Placement(prompt=prompt, box=tuple(self.box), box_ratio=1.0, crop_ratio=self.crop_ratio)
        for seed in range(count):
            yield Request(self.scene, [placement], seed, self.sampling)


def place(client: Client, place: Place, prompt: str, count: int) -> list[Picture]:
    """Place a prompt from `count` seeds.

    Raises:
        AnyDoorError: the server refuses it, or has changed the scene elsewhere.
    """
    pictures = []
    for request in ProgressBar(place.requests(prompt, count), desc=prompt, total=count):
        [result] = client.run(request, timeout=_TIMEOUT)
        picture = np.asarray(result.image)
        elsewhere = np.ones(place.scene.shape[:2], bool)
        for region in result.regions:
            elsewhere[region.slices] = False
        if (picture != place.scene)[elsewhere].any():
            raise AnyDoorError(f"'{prompt}' with the seed {request.seed} has changed the scene elsewhere")
        pictures.append(picture)
    return pictures


def share(gallery: Gallery, pictures: Sequence[Picture], place: Place, number: int) -> float:
    """Return the share of pictures whose place shows object `number`."""
    return recognised(gallery, [picture[place.seen] for picture in pictures], number)


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], Picture]:
    """Place the subject and its class; return a row per prompt, and the sheet.

    Raises:
        AnyDoorError: something cannot be used.
    """
    folders = sorted(path for path in options.objects.iterdir() if path.is_dir())
    if not 0 <= options.number < len(folders) or len(folders) < 2:
        raise InputError(
            f"'{options.objects}' has {len(folders)} folders of pictures, too few for number {options.number}"
        )
    noun = folders[options.number].name.rpartition("-")[2]
    gallery = object_gallery(folders, options.side)
    sampling = Sampling(steps=options.steps, guidance_scale=options.guidance_scale)
    where = Place(load_picture(options.scene, "the scene").rgb, options.box, options.crop_ratio, sampling)
    rows, shown = [], []
    with ServerProcess(options.bundle) as server, Client(server.address) as client:
        for prompt in (f"a {options.identifier} {noun}", f"a {noun}"):
            pictures = place(client, where, prompt, options.count)
            rows.append({"prompt": prompt, "recognised": share(gallery, pictures, where, options.number)})
            shown.append(np.concatenate(pictures[:SHOWN], axis=1))
    return rows, np.concatenate(shown)


def read_box(text: str) -> Box:
    """Read x0,y0,x1,y1."""
    try:
        x0, y0, x1, y1 = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not x0,y0,x1,y1") from None
    return Box(x0, y0, x1, y1)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="placed_subject.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("bundle", type=Path, help="of a subject")
    result.add_argument("--objects", type=Path, required=True, metavar="DIR", help="folders of pictures")
    result.add_argument("--number", type=int, default=0, metavar="N", help="of the subject (default: 0)")
    result.add_argument("--identifier", default="gzj", help="its word (default: %(default)s)")
    result.add_argument("--side", type=int, default=64, help="the objects' pictures, in pixels (default: 64)")
    result.add_argument("--scene", type=Path, default=Path("examples/scene.png"), help="default: %(default)s")
    result.add_argument(
        "--box", type=read_box, default=Box(150, 90, 250, 190), help="x0,y0,x1,y1 (default: 150,90,250,190)"
    )
    result.add_argument("--crop-ratio", type=float, default=1.3, help="default: %(default)s")
    result.add_argument("--guidance-scale", type=float, default=3.0, help="default: %(default)s")
    result.add_argument("--steps", type=int, default=20, help="of sampling (default: %(default)s)")
    result.add_argument("--count", type=int, default=100, help="seeds of each prompt (default: 100)")
    result.add_argument("--output", type=Path, default=Path("build/placed_subject.json"), metavar="FILE")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 if something cannot be used."""
    options = parser().parse_args(arguments)
    sheet = options.output.with_suffix(".png")
    try:
        if options.count < 1:
            raise InputError("--count is at least 1")
        require_writable(options.output)
        rows, pictures = measure(options)
        settings = {
            name: getattr(options, name) for name in ("steps", "guidance_scale", "crop_ratio", "count")
        }
        settings["box"] = list(options.box)
        write_results(options.output, {"machine": describe(), "settings": settings, "rows": rows})
        with replacing(sheet) as partial:
            Image.fromarray(pictures).save(partial, "PNG")
    except (AnyDoorError, OSError) as error:
        print(f"placed_subject.py: {error}", file=sys.stderr)
        return 2
    for row in rows:
        print(f"{row['prompt']:<24} recognised in {row['recognised']:.1%}")
    print(f"{options.output}, {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
