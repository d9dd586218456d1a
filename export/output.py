"""Checks what a build would replace, and what it records of files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from engines.bundle import REST
from engines.errors import AnyDoorError
from engines.files import is_partial
from engines.manifest import FORMAT, LARGEST_MANIFEST, MANIFEST
from engines.schema import LONGEST_TEXT
from engines.signature import SIGNATURE
from engines.strict_json import read_limited
from export.noise import RECIPE

_BESIDE_THE_LISTED = frozenset((MANIFEST, SIGNATURE, REST, RECIPE))
"""Files of a bundle that its manifest does not list; building it again makes them anew, or they go."""


def check_output(output: Path, inputs: Sequence[Path] = ()) -> None:
    """Refuses to replace what is no bundle, or holds more than one.

    Args:
        output: directory of the bundle to build.
        inputs: files and folders that it is built from.

    Raises:
        AnyDoorError: something would be lost, or the directory cannot be replaced; says what.
    """
    if output.is_file():
        raise AnyDoorError(f"'{output}' is a file, and a bundle is a folder: give another --output")
    place = Path(os.path.realpath(output))
    for each in inputs:
        taken = Path(os.path.realpath(each))
        if taken == place:
            raise AnyDoorError(f"'{output}' is the folder to build from: give another --output")
        if taken.is_relative_to(place):
            raise AnyDoorError(f"'{each}', which is built from, lies in '{output}': give another --output")
    if not output.exists():
        return
    if os.path.ismount(place):
        raise AnyDoorError(f"'{output}' is a mount point, which cannot be replaced: give a folder in it")
    _check_content(output)
    if os.path.samefile(place, os.curdir):
        raise AnyDoorError(
            f"'{output}' is the folder that you are in, which a build would replace: give another --output"
        )


def _check_content(folder: Path) -> None:
    """Refuses a folder that holds anything but a bundle.

    Raises:
        AnyDoorError: names what else is there.
    """
    entries = sorted(folder.iterdir())
    listed = _listed_files(folder / MANIFEST)
    if entries and listed is None:
        raise AnyDoorError(f"'{folder}' is a directory with other things in it: give another --output")
    known = _BESIDE_THE_LISTED.union(listed or ())
    for entry in entries:
        if is_partial(entry.name):
            continue
        if entry.is_dir() or entry.name not in known:
            what = "the folder" if entry.is_dir() else "the file"
            raise AnyDoorError(
                f"{what} '{entry.name}' in '{folder}' is no part of the bundle there and would be lost: move "
                "it away, or give another --output"
            )


def _listed_files(path: Path) -> set[str] | None:
    """Returns the paths that a manifest lists, or None if it is no bundle's.

    It may be of any format version, and one that cannot be used: such a bundle is built again.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(read_limited(path, LARGEST_MANIFEST))
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    listed, left = set(), [content]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            name = each.get("path")
            if isinstance(name, str) and "sha256" in each:
                listed.add(name)
            left.extend(each.values())
        elif isinstance(each, list):
            left.extend(each)
    return listed


def printable(name: str) -> str:
    """Returns the name of a file as a manifest may have it: without what cannot be shown."""
    return "".join(each if each.isprintable() else "?" for each in name)[:LONGEST_TEXT]
