"""Reads many files as pictures and as masks, in a process of its own, whose memory shows what they take.

    python -m tests.support.picture_fuzz COUNT SEED

Prints how many were read and refused, and by how many bytes the process has grown.
"""

from __future__ import annotations

import json
import random
import sys
import warnings
from contextlib import suppress

from benchmarks.support.machine import peak_memory_gb
from runtime.errors import InputError, collecting_warnings
from runtime.imaging.masks import load_mask
from runtime.imaging.pictures import encode_picture
from runtime.imaging.scene import load_scene, with_own_pixels
from tests.support.picture_grammar import picture_file

MAX_PIXELS = 1_000_000


def read(content: bytes) -> bool:
    """Reads a file as a scene and as a mask, and writes the scene; whether the scene was taken."""
    with collecting_warnings():
        with suppress(InputError):
            load_mask(content, "the mask", MAX_PIXELS)
        try:
            seen, scene = load_scene(content, MAX_PIXELS)
        except InputError:
            return False
        assert seen.shape == (*scene.rgb.shape[:2], 3)
        for file_format in ("PNG", "JPEG"):
            encode_picture(with_own_pixels(seen, scene, []), file_format, scene.metadata)
        return True


def main(count: int, seed: int) -> None:
    """Prints a JSON object; an exception says which file it is about."""
    warnings.simplefilter("ignore")
    before = peak_memory_gb()
    taken = 0
    for index in range(count):
        content = picture_file(random.Random(f"{seed} {index}"))
        try:
            taken += read(content)
        except BaseException:
            print(f"file {index} of seed {seed}: {content[:200].hex()}", file=sys.stderr)
            raise
    grown = round((peak_memory_gb() - before) * 1e9)
    print(json.dumps({"taken": taken, "refused": count - taken, "grown_bytes": grown}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
