"""`python -m runtime` is the command `anydoor`."""

import sys

from runtime.cli import main

sys.exit(main())
