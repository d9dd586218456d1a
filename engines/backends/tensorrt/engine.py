"""Loads a bundle's plans with TensorRT or TensorRT for RTX, on an NVIDIA card. `engines.card.engine` runs
them."""

from __future__ import annotations

from functools import partial

from engines.backends.tensorrt.library import VARIANTS, Library, check_card, check_plans, usable_library
from engines.backends.tensorrt.plans import open_plan
from engines.bundle import Bundle
from engines.card.engine import CardEngine
from engines.cuda import Device
from engines.errors import BackendError
from engines.manifest import BUILD_COMMAND
from engines.memory_plan import needed_device_bytes, plan_device_memory, plan_for_card
from engines.options import EngineOptions


def usable_devices() -> dict[str, str]:
    """Returns the card, with the variants of the library that are installed and support it, and their
    versions.

    Raises:
        BackendError: there is none.
    """
    libraries, refusals = [], []
    for backend in VARIANTS:
        try:
            libraries.append(usable_library(backend))
        except BackendError as error:
            refusals.append(error)
    if not libraries:
        raise refusals[0]
    return {"cuda": ", ".join(f"{library.variant.title} {library.version}" for library in libraries)}


def fits(bundle: Bundle, options: EngineOptions) -> bool:
    """Returns whether the card has the memory for a bundle; graphs are swapped if it is short."""
    try:
        plan_for_card(bundle.manifest, options.memory_budget, Device().card().free)
    except BackendError:
        return False
    return True


def needed_bytes(bundle: Bundle, options: EngineOptions) -> int:
    """Returns the memory that a bundle needs, all graphs loaded; see `engines.engine.needed_bytes`."""
    return needed_device_bytes(bundle.manifest)


def examine(bundle: Bundle, options: EngineOptions) -> tuple[str, str]:
    """Returns the card that would run a bundle, and the memory plan.

    Raises:
        BackendError: the library or the card is missing, or has not enough memory.
        BundleError: a plan is unusable here.
    """
    library = _check(bundle, options)
    card = Device().card()
    check_card(library, bundle, card)
    return card.name, plan_for_card(bundle.manifest, options.memory_budget, card.free).table()


def open_engine(bundle: Bundle, options: EngineOptions, most_cache: int | None = None) -> CardEngine:
    """Returns the engine for a bundle of plans; see `engines.engine.open_engine`. It has no use for
    `threads`."""
    library = _check(bundle, options)
    device = Device()
    card = device.card()
    check_card(library, bundle, card)
    plan = plan_for_card(bundle.manifest, options.memory_budget, card.free, most_cache)
    open_graph = partial(open_plan, library, bundle)
    return CardEngine(bundle.manifest.backend, bundle, device, open_graph, plan, options.cuda_graphs)


def _check(bundle: Bundle, options: EngineOptions) -> Library:
    """Returns the library for a bundle, after refusing what can be refused without a card."""
    if options.device == "cpu":
        raise BackendError(
            f"the bundle at '{bundle.path}' holds plans for an NVIDIA card: build one for the CPU with "
            f"'{BUILD_COMMAND} --backend onnxruntime'"
        )
    library = check_plans(bundle)
    if options.memory_budget is not None:
        plan_device_memory(bundle.manifest, options.memory_budget)
    return library
