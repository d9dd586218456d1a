"""What the tests of the batcher share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.compositor import Compositor
from tests.support.scheduling import Bench
from tests.support.serving import held_compositor


@pytest.fixture(scope="module")
def alone(tiny_bundle: Path) -> Compositor:
    """Makes the pictures that the batcher's are compared with."""
    return held_compositor(tiny_bundle)[0]


@pytest.fixture
def bench(tiny_bundle: Path) -> Iterator[Bench]:
    with Bench(tiny_bundle) as bench:
        yield bench
