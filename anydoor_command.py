"""The command `anydoor`, also `python -m runtime`.

It starts from a module with a name of its own, because other programs have files and packages called
`runtime` and `engines`, too. Where Python would take one of those instead of ours, this says which.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import find_spec

_PACKAGES = ("runtime", "engines")


def main() -> int:
    """Runs a command; returns its exit code."""
    if os.getpid() == 1:
        # the first process of a container gets no signal that it has no handler for
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    try:
        return _run()
    except KeyboardInterrupt:
        print("anydoor: interrupted", file=sys.stderr)
        return 130


def _run() -> int:
    for package in _PACKAGES:
        hiding = hiding_file(package)
        if hiding:
            print(
                f"anydoor: '{hiding}' hides the package '{package}' of anydoor-runtime: rename it, or take "
                "its folder off Python's path (PYTHONPATH)",
                file=sys.stderr,
            )
            return 2
    from runtime.huge_pages import reexec_with_huge_pages

    if "--no-huge-pages" not in sys.argv:
        # before anything is loaded that would have to be loaded twice
        reexec_with_huge_pages(verbose=bool({"-v", "--verbose"} & set(sys.argv)))
    from runtime.cli import main as run

    return run()


def hiding_file(package: str) -> str | None:
    """The file or folder that Python imports as a package, if it is not the one beside this module."""
    ours = os.path.join(os.path.dirname(os.path.realpath(__file__)), package)
    spec = find_spec(package)
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or [])
    if any(os.path.realpath(place) == ours for place in places):
        return None
    return spec.origin or places[0]


if __name__ == "__main__":
    sys.exit(main())
