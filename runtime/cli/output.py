"""Checks the output files before the work, and writes them afterwards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.cli.output_place import check_place, save_pictures
from runtime.cli.standard_streams import STREAM, check_standard_output
from runtime.errors import collecting_warnings
from runtime.imaging.decoding import size_in_head
from runtime.imaging.pictures import check_size, contact_sheet, format_of, sheet_size
from runtime.result import Composite
from runtime.validation import check_seeds


def check_output(output: Path, scene: Path | bytes | None, num_images: int, grid: bool) -> None:
    """Refuses an output that could not be written after minutes of work.

    Args:
        output: as given with --output.
        scene: the picture whose size the output has, or the bytes of its file; not decoded. None if there is
            none.
        num_images: how many pictures there will be.
        grid: whether they are written as one contact sheet.

    Raises:
        InputError: there are too many, or none; the name has no known ending, its format cannot hold a
            picture of the size, or it cannot be written there.
    """
    check_seeds(0, num_images)
    if output == STREAM:
        check_standard_output(1 if grid else num_images)
        return
    format_of(output)
    for path in [output] if grid else output_paths(output, num_images):
        check_place(path)
    size = _size_of(scene) if scene else None
    if size:
        check_size(sheet_size(size, num_images) if grid else size, output)


def output_paths(output: Path, count: int) -> list[Path]:
    """Returns the files for so many pictures: NAME.png, or NAME-1.png, NAME-2.png and so on."""
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i + 1}{output.suffix}") for i in range(count)]


def write_output(output: Path, results: Sequence[Composite], grid: bool) -> None:
    """Writes pictures, and prints their names and seeds, and on standard error their warnings.

    Raises:
        InputError: a file cannot be written; its picture is elsewhere then.
    """
    images, metadata = [result.image for result in results], results[0].metadata
    paths, seeds = output_paths(output, len(results)), [f"(seed {result.seed})" for result in results]
    if grid:
        images, paths = [contact_sheet(images)], [output]
        seeds = [f"(seeds {results[0].seed} to {results[-1].seed})"]
    seed_of = dict(zip(paths, seeds))

    def tell(path: Path) -> None:
        if path == STREAM:
            print(f"standard output {seed_of[path]}", file=sys.stderr)
        else:
            print(f"{path} {seed_of[path]}")

    with collecting_warnings() as warned:
        save_pictures(zip(images, paths), metadata, on_saved=tell)
    for text in dict.fromkeys((*results[0].warnings, *warned)):
        print(f"anydoor: warning: {text}", file=sys.stderr)


def _size_of(picture: Path | bytes) -> tuple[int, int] | None:
    """Returns (width, height) in pixels, from the head of a file; None if it cannot be read, which is refused
    later, or only once, as a pipe."""
    return None if isinstance(picture, Path) and not picture.is_file() else size_in_head(picture)
