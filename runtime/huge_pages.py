"""Requests 2 MB memory pages for the networks, on systems that give them on request only.

ONNX Runtime returns the memory of every intermediate result to the system and takes new memory for the next
one, tens of megabytes at a time. Clearing it in pages of 4 kB takes a third of the time of a step; with pages
of 2 MB it takes next to nothing, for the same peak (docs/studies/huge-pages.md). The allocator of glibc asks
for them if an environment variable says so before the program starts. So the command `anydoor` starts itself
again with that variable.

An application that uses the runtime as a library sets the variable itself:

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python application.py

and GLIBC_TUNABLES=glibc.malloc.hugetlb=0 keeps the command from starting again.
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
"""The first version that has the setting."""


def environment(variables: Mapping[str, str], offer: Path = OFFER) -> dict[str, str] | None:
    """Returns the variables with the setting, or None where it would change nothing or the user has
    chosen."""
    tunables = variables.get(VARIABLE, "")
    if SETTING in tunables or not madvise_available(offer):
        return None
    return {**variables, VARIABLE: ":".join(filter(None, [tunables, f"{SETTING}=1"]))}


def madvise_available(offer: Path = OFFER) -> bool:
    """Returns whether large pages are given to programs that ask for them: not to all, and not to none."""
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "none 0.0").split()
        enough = tuple(int(part) for part in version.split(".")[:2]) >= _FIRST_GLIBC
        return library == "glibc" and enough and "[madvise]" in offer.read_text()
    except (OSError, ValueError):
        return False


def reexec_with_huge_pages(verbose: bool = False) -> None:
    """Replaces this process by the same command with the setting; returns where that would change nothing.

    Args:
        verbose: say on standard error that it is done.
    """
    variables = environment(os.environ)
    if variables is None:
        return
    if verbose:
        print(
            f"anydoor: starting again with {VARIABLE}={variables[VARIABLE]}, for 2 MB pages", file=sys.stderr
        )
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], variables)
