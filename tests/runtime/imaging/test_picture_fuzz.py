"""Whatever the bytes are: a picture or a refusal, and no more memory than is documented."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.picture_fuzz import MAX_PIXELS

BYTES_PER_PIXEL = 40
ELSE = 128_000_000
"""The bounds of `runtime.imaging.decoding`; the files of the grammar are small."""


@pytest.mark.parametrize(("count", "seed"), [(500, 1), pytest.param(20_000, 2, marks=pytest.mark.nightly)])
def test_any_file_is_a_picture_or_refused(count: int, seed: int) -> None:
    command = [sys.executable, "-m", "tests.support.picture_fuzz", str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["taken"] > count / 10
    assert found["refused"] > count / 10
    assert found["grown_bytes"] < BYTES_PER_PIXEL * MAX_PIXELS + ELSE
