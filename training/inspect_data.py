"""Draws a sheet of training pairs and tells how fast they are made.

    python -m training.inspect_data training/recipes/anydoor-small.toml pairs.png

One column per pair: the reference, the collage of the hint, its mask (white: fill this, grey: scene, black:
padding), and the picture that shall come out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.config import read_recipe
from training.data.encoded import pair_of_views
from training.data.pairs import Pair
from training.data.view_store import ViewStore


def to_picture(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A picture (3, R, R), about -1..1, as uint8 (R, R, 3)."""
    picture: NDArray[np.uint8] = np.clip(values.transpose(1, 2, 0) * 127.5 + 127.5, 0, 255).astype(np.uint8)
    return picture


def column(pair: Pair, *more: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A pair from top to bottom, uint8 (rows * R, R, 3); `more` pictures (3, R, R) go before the last."""
    side = pair.picture.shape[-1]
    reference = np.asarray(Image.fromarray(pair.reference).resize((side, side)))
    mask = np.repeat(pair.hint[3:], 3, axis=0)
    below = [to_picture(picture) for picture in (pair.hint[:3], mask, *more, pair.picture)]
    return np.concatenate([reference, *below])


def draw_sheet(columns: list[NDArray[np.uint8]], path: Path) -> None:
    """Writes columns side by side."""
    Image.fromarray(np.concatenate(columns, axis=1)).save(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.inspect_data", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--folder", type=Path, help="where views/ is; default: runs/NAME of the recipe")
    parser.add_argument("--count", type=int, default=12)
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.recipe)
    store = ViewStore((arguments.folder or Path("runs") / arguments.recipe.stem) / "views")
    began = time.perf_counter()
    pairs = [pair_of_views(store, number, seed=2, rules=recipe.pairs) for number in range(arguments.count)]
    print(f"{len(pairs) / (time.perf_counter() - began):.1f} pairs per second in one process")
    draw_sheet([column(pair) for pair in pairs], arguments.output)


if __name__ == "__main__":
    main()
