"""AnyDoor Runtime: puts an object from one picture into another.

from runtime import Compositor, Placement

compositor = Compositor.load("build/engines/anydoor")
image = compositor.composite("desk.jpg", Placement("cup.png", box=(80, 60, 300, 260)), seed=7)
"""

from engines.errors import AnyDoorError, BackendError, BundleError
from runtime.collage import Ratios
from runtime.compositor import Compositor
from runtime.errors import InputError
from runtime.job import Composite
from runtime.quality import preset
from runtime.request import Placement, Sampling

__all__ = [
    "AnyDoorError",
    "BackendError",
    "BundleError",
    "Composite",
    "Compositor",
    "InputError",
    "Placement",
    "Ratios",
    "Sampling",
    "preset",
]
