"""Runs commands as scripts: errors become one sentence and an exit code, as those of `anydoor` do."""

from __future__ import annotations

import sys
from collections.abc import Callable

from engines.errors import AnyDoorError
from runtime.standard_output import forget_output


def run_script(name: str, run: Callable[[], int]) -> int:
    """Runs a command.

    Args:
        name: of the script, before its errors.
        run: the command; returns its exit code.

    Returns:
        The exit code: 2 for what the user can fix, 130 after Ctrl-C, 1 where nobody reads the output.
    """
    try:
        code = run()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except AnyDoorError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        forget_output()
        return 1
