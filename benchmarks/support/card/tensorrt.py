"""What TensorRT and TensorRT for RTX say of this card: they build, open and run the smallest network."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.support import example
from benchmarks.support.card.task import NETWORKS, Row, Task
from engines.backends.tensorrt.library import VARIANTS, Library, load_library
from engines.bundle import Bundle
from engines.cuda import Device
from engines.errors import AnyDoorError
from engines.options import EngineOptions
from runtime import Compositor, Sampling


def tensorrt(task: Task) -> Iterator[Row]:
    """Try every variant."""
    for backend, variant in VARIANTS.items():
        row: Row = {"library": variant.title}
        try:
            library = load_library(backend)
            row["version"] = library.version
            yield {**row, "says": _try(library, Path(task.folder))}
        except (AnyDoorError, ModuleNotFoundError) as error:
            yield {**row, "says": str(error)}


def _try(library: Library, folder: Path) -> str:
    from export.build import build_plan_bundle
    from export.options import BuildOptions
    from export.progress import Progress

    card = Device().card()
    targets = (card.architecture,) if library.variant.targets else ()
    source = Bundle.open(folder / NETWORKS["cpu"])
    with tempfile.TemporaryDirectory() as temporary:
        plans = Path(temporary) / "plans"
        options = BuildOptions(library.backend, source.manifest.precision, targets=targets)
        started = time.monotonic()
        build_plan_bundle(source, plans, options, Progress(quiet=True))
        built = time.monotonic() - started
        compositor = Compositor.load(plans, EngineOptions(backend=library.backend))
        compositor.composite(example.SCENE, example.placement(), sampling=Sampling(steps=2), seed=1)
    return (
        f"plans of the smallest network are built for {card.architecture} in {built:.0f} s and draw a picture"
    )
