"""Loads TensorRT in both variants, and refuses plans that cannot run on this machine.

TensorRT for RTX (`tensorrt_rtx`) and TensorRT (`tensorrt`) have the same API. What differs is in `VARIANTS`
and in the few branches on what the library offers.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engines.backends.tensorrt import BACKENDS
from engines.bundle import Bundle
from engines.cuda import Card, Device, OutOfDeviceMemoryError
from engines.errors import BackendError, BundleError
from engines.manifest import BUILD_COMMAND

if TYPE_CHECKING:
    # what both have; tests/bindings.py holds the uses against two versions of TensorRT
    import tensorrt

_BACKENDS = {backend.name: backend for backend in BACKENDS}


@dataclass(frozen=True)
class Variant:
    """A variant of TensorRT."""

    title: str
    install: str
    targets: tuple[str, ...] = ()
    """The GPU architectures that it supports, if plans for them are built on any machine; empty if plans are
    for the card of the machine that builds them."""
    builder_flags: tuple[str, ...] = ()
    times_kernels: bool = False
    """Whether building tries kernels out on the card, and so has timings worth keeping."""


VARIANTS: Mapping[str, Variant] = {
    "tensorrt_rtx": Variant(
        title=_BACKENDS["tensorrt_rtx"].title,
        install=_BACKENDS["tensorrt_rtx"].install,
        # its support matrix (docs.nvidia.com/deeplearning/tensorrt-rtx, "Supported Compute Capabilities");
        # sm80 can be built and is not in it
        targets=("sm75", "sm86", "sm89", "sm120", "sm121"),
        # without it the runtime allocates by itself, and a CUDA graph cannot be captured
        builder_flags=("REQUIRE_USER_ALLOCATION",),
    ),
    "tensorrt": Variant(
        title=_BACKENDS["tensorrt"].title,
        install=_BACKENDS["tensorrt"].install,
        times_kernels=True,
    ),
}
"""Backend and name of the package -> its variant."""

_JETSONS = ("sm87", "sm110")
"""Orin and Thor."""

_DIAGNOSTICS = {
    "MALFORMED_ENGINE": "it is damaged, or is not a plan of {title}: copy the bundle again, or rebuild it "
    "with {rebuild}",
    "VERSION_MISMATCH": "another version of {title} built it: rebuild it with {rebuild}",
    "UNSUPPORTED_CC": "it is for {target} and this card is {architecture}: rebuild it with {rebuild}",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old for it: install a current one (on Ubuntu: "
    "sudo ubuntu-drivers install)",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it: pip install -U cuda-python {package}",
    "INSUFFICIENT_GPU_MEMORY": "the card has too little memory for it: rebuild it with {rebuild} and "
    "--max-batch 1",
    "CUDA_ERROR": "the NVIDIA driver does not work: check it with 'anydoor doctor'",
}
"""Maps the library's diagnostics of a plan's header to their meaning and remedy."""


class Library:
    """One variant, loaded. There is one per process: TensorRT keeps the first logger it is given."""

    def __init__(self, backend: str) -> None:
        """Imports the package; `load_library` is the way to get one."""
        self.backend = backend
        self.variant = VARIANTS[backend]
        try:
            self.module: Any = importlib.import_module(backend)
        except ImportError as error:
            raise BackendError(
                f"{self.variant.title} is not installed; install it with: {self.variant.install}"
            ) from error
        self.messages: list[tuple[str, str]] = []
        """Severity (ERROR, WARNING, INFO) and text of what the library said since `clear_messages`."""
        self.logger = self._make_logger()
        self.version: str = self.module.__version__

    @functools.cached_property
    def runtime(self) -> tensorrt.Runtime:
        """TensorRT's runtime."""
        runtime: tensorrt.Runtime = self.module.Runtime(self.logger)
        return runtime

    def clear_messages(self) -> None:
        """Empties `messages`."""
        self.messages.clear()

    def reason(self) -> str:
        """Returns the last error that the library logged, on one line."""
        errors = [text for severity, text in self.messages if severity.endswith("ERROR")]
        return " ".join(errors[-1].split()) if errors else "it does not say why"

    def rebuild_command(self, target: str) -> str:
        """Returns the command that builds a bundle again, for those of its architectures that can be built
        for."""
        targets = ",".join(name for name in target.split(",") if name in self.variant.targets)
        flag = f" --targets {targets}" if targets else ""
        return f"'{BUILD_COMMAND} --backend {self.backend}{flag}'"

    def _make_logger(self) -> tensorrt.ILogger:
        module, messages = self.module, self.messages
        levels: type[tensorrt.ILogger.Severity] = module.ILogger.Severity
        kept = {
            level: level.name for level in (levels.INTERNAL_ERROR, levels.ERROR, levels.WARNING, levels.INFO)
        }

        class Logger(module.ILogger):  # type: ignore[misc, name-defined]
            """Keeps what the library says, for refusals and for the sizes that only its log tells."""

            def log(self, severity: tensorrt.ILogger.Severity, text: str) -> None:
                if severity in kept:
                    messages.append((kept[severity], text))

        logger: tensorrt.ILogger = Logger()
        return logger


@functools.cache
def load_library(backend: str) -> Library:
    """Returns the library of a backend, one of `VARIANTS`.

    Raises:
        BackendError: it is not installed.
    """
    return Library(backend)


def usable_library(backend: str) -> Library:
    """Returns the library of a backend, unless this machine has a card that it does not support.

    Raises:
        BackendError: it is not installed, or does not support the card.
    """
    library = load_library(backend)
    if card := _card():
        check_support(library.variant, card)
    return library


def check_plans(bundle: Bundle) -> Library:
    """Returns the library for a bundle, after refusing what can be refused before anything is on a card.

    Raises:
        BackendError: the library is not installed, or does not support the card.
        BundleError: a plan is of another version, damaged, or not a plan.
    """
    # a card that it does not support comes first: no other advice would help
    library = usable_library(bundle.manifest.backend)
    check_version(library, bundle)
    for graph in bundle.manifest.graphs:
        check_header(library, bundle, graph)
    return library


def _card() -> Card | None:
    """Returns the card of this machine; None without one, which whoever needs it explains."""
    try:
        return Device().card()
    except BackendError:
        return None


def check_version(library: Library, bundle: Bundle) -> None:
    """Refuses plans that another version of the library built. Needs no card.

    Raises:
        BundleError: another version built them.
    """
    built_with = bundle.manifest.backend_version
    if built_with != library.version:
        raise BundleError(
            f"the bundle at '{bundle.path}' was built with {library.variant.title} {built_with} and "
            f"{library.version} is installed: install that version (pip install "
            f"{library.backend}=={built_with}), or rebuild the bundle with "
            f"{library.rebuild_command(bundle.manifest.target)}"
        )


def check_support(variant: Variant, card: Card) -> None:
    """Refuses a card that the library does not support, and says what works on it.

    Raises:
        BackendError: it is none of `Variant.targets`.
    """
    if not variant.targets or card.architecture in variant.targets:
        return
    instead = (
        "build plans on this machine with the TensorRT of its JetPack, 'anydoor build ONNX_BUNDLE --backend "
        "tensorrt'"
        if card.architecture in _JETSONS
        else f"build for ONNX Runtime's CUDA provider with '{BUILD_COMMAND} --backend onnxruntime --targets "
        "cuda', or with --backend tensorrt where TensorRT is installed"
    )
    raise BackendError(
        f"{variant.title} supports {', '.join(variant.targets)}, and not this card, {card.name}, which is "
        f"{card.architecture}: {instead}"
    )


def check_card(library: Library, bundle: Bundle, card: Card) -> None:
    """Refuses a card that the library does not support, and plans that were built on another kind of card.

    Of plans for a supported card, TensorRT for RTX tells by the header whether they run on this one.

    Raises:
        BackendError: the library does not support the card.
        BundleError: the plans were built on another kind.
    """
    check_support(library.variant, card)
    target = bundle.manifest.target
    if target != card.architecture and not library.variant.targets:
        raise BundleError(
            f"the bundle at '{bundle.path}' is for {target} and this card, {card.name}, is "
            f"{card.architecture}: build plans on this machine with 'anydoor build ONNX_BUNDLE --backend "
            f"{library.backend}'"
        )


def check_header(library: Library, bundle: Bundle, graph: str) -> None:
    """Refuses a plan that the library finds unfit for this machine by its first bytes.

    TensorRT has no such check; it says the same when the plan is opened.

    Raises:
        BackendError: the library does not support the card.
        BundleError: the plan is damaged, of another version or for another card, or is not a plan.
    """
    runtime: Any = library.runtime
    if not hasattr(runtime, "get_engine_validity"):
        return
    with bundle.graph_file(graph).open("rb") as file:
        header = file.read(runtime.engine_header_size)
    validity, diagnostics = runtime.get_engine_validity(header)
    # without a driver the library says "invalid" and gives no reason; what follows says it better
    if validity == library.module.EngineValidity.INVALID and diagnostics:
        raise header_refusal(library, bundle, graph, diagnostics)


def header_refusal(library: Library, bundle: Bundle, graph: str, diagnostics: int) -> BundleError:
    """Returns the error for the diagnostic bits of a plan's header.

    Raises:
        BackendError: the library does not support the card, so no other plan of it would run either.
    """
    bits = library.module.EngineInvalidityDiagnostics
    found = [name for name in _DIAGNOSTICS if diagnostics & int(getattr(bits, name))]
    text = "; ".join(_DIAGNOSTICS[name] for name in found) or f"the library says {diagnostics:#x}"
    target = bundle.manifest.target
    card = _card() if "UNSUPPORTED_CC" in found else None
    if card:
        check_support(library.variant, card)
    meaning = text.format(
        title=library.variant.title,
        package=library.backend,
        target=target,
        architecture=card.architecture if card else "another",
        rebuild=library.rebuild_command(card.architecture if card else target),
    )
    return BundleError(f"the plan '{bundle.graph_file(graph)}' cannot be used: {meaning}")


def loading_refusal(library: Library, bundle: Bundle, graph: str) -> BackendError | BundleError:
    """Returns the error for a plan that the library did not open, from its log."""
    reason, target = library.reason(), bundle.manifest.target
    said = reason.lower()
    if "out of memory" in said or "outofmemory" in said:
        return OutOfDeviceMemoryError(
            f"the card has no room for the graph '{graph}': give a smaller --memory-budget, close other "
            "programs that use it (see 'nvidia-smi'), or build with --max-batch 1"
        )
    return BundleError(
        f"{library.variant.title} cannot open the plan '{bundle.graph_file(graph)}', built for {target}: "
        f"{reason}; if it is for another card or version, rebuild it on this machine with "
        f"{library.rebuild_command(target)}"
    )
