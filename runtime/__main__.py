"""The command `anydoor`, also `python -m runtime`."""

import sys

from runtime.huge_pages import start_again_with_them


def main() -> int:
    """Runs a command; returns its exit code."""
    start_again_with_them()  # before anything is loaded that would have to be loaded twice
    from runtime.cli.composite import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
