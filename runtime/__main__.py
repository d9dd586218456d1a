"""Runs the command `anydoor` as `python -m runtime`."""

import sys

from anydoor_command import main

if __name__ == "__main__":
    sys.exit(main())
