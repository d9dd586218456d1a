"""Large pages for what the networks compute, where Linux gives them to programs that ask.

ONNX Runtime returns the memory of every intermediate result to the system and takes new memory for the
next one, tens of megabytes at a time. Clearing that in pages of 4 kB takes a third of the time of a step;
with pages of 2 MB it takes next to nothing, for the same peak (docs/performance.md). The allocator of glibc
asks for them if a variable of the environment tells it to before the program starts.

An application that uses the runtime as a library sets the variable itself:

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python application.py
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb"
OFFER = Path("/sys/kernel/mm/transparent_hugepage/enabled")

_FIRST_GLIBC = 2, 35
"""The first that knows the setting."""


def environment(variables: Mapping[str, str], offer: Path = OFFER) -> dict[str, str] | None:
    """The variables with the setting, or None where it would change nothing or the user has chosen."""
    tunables = variables.get(VARIABLE, "")
    if SETTING in tunables or not _asks_for_them(offer):
        return None
    return {**variables, VARIABLE: ":".join(filter(None, [tunables, f"{SETTING}=1"]))}


def _asks_for_them(offer: Path) -> bool:
    """Whether large pages are there for the asking: not given to everybody anyway, and not to nobody."""
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "none 0.0").split()
        enough = tuple(int(part) for part in version.split(".")[:2]) >= _FIRST_GLIBC
        return library == "glibc" and enough and "[madvise]" in offer.read_text()
    except (OSError, ValueError):
        return False


def start_again_with_them() -> None:
    """Replaces this program by itself, with the setting; returns where that would change nothing."""
    variables = environment(os.environ)
    if variables is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], variables)
