"""TensorRT in both variants: finds the library, and refuses a plan that cannot run here.

TensorRT for RTX (`tensorrt_rtx`) and TensorRT (`tensorrt`) have the same API. What differs is in `VARIANTS`
and in the few branches on what the library offers.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.backends.tensorrt import BACKENDS
from engines.bundle import Bundle
from engines.cuda import Card, OutOfDeviceMemoryError
from engines.errors import BackendError, BundleError
from engines.manifest import BUILD_COMMAND

_TITLES = {backend.name: backend.title for backend in BACKENDS}


@dataclass(frozen=True)
class Variant:
    """What sets one TensorRT apart from the other."""

    title: str
    install: str
    targets: tuple[str, ...] = ()
    """GPU architectures whose plans are built on any machine; empty if only for the card of this machine."""
    builder_flags: tuple[str, ...] = ()
    times_kernels: bool = False
    """Whether building tries kernels out on the card, and so has timings worth keeping."""


VARIANTS: Mapping[str, Variant] = {
    "tensorrt_rtx": Variant(
        title=_TITLES["tensorrt_rtx"],
        install="pip install '.[tensorrt]'",
        targets=("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
        # without it the runtime allocates by itself, and a CUDA graph cannot be captured
        builder_flags=("REQUIRE_USER_ALLOCATION",),
    ),
    "tensorrt": Variant(
        title=_TITLES["tensorrt"],
        install="pip install tensorrt (on a Jetson: sudo apt install python3-libnvinfer)",
        times_kernels=True,
    ),
}
"""Backend and name of the package -> its variant."""

_DIAGNOSTICS = {
    "MALFORMED_ENGINE": "it is damaged, or is not a plan of {title}: copy the bundle again, or rebuild it "
    "with {rebuild}",
    "VERSION_MISMATCH": "another version of {title} built it: rebuild it with {rebuild}",
    "UNSUPPORTED_CC": "it is for {target} and this card is another: rebuild it with {rebuild} and the card's "
    "architecture in --targets, or with --backend tensorrt on this machine",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old for it: install a current one (on Ubuntu: "
    "sudo ubuntu-drivers install)",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it: pip install -U cuda-python {package}",
    "INSUFFICIENT_GPU_MEMORY": "the card has too little memory for it: rebuild it with {rebuild} and "
    "--max-batch 1",
    "CUDA_ERROR": "the NVIDIA driver does not work: check it with 'anydoor doctor'",
}
"""What the library says of a plan's header -> what it means, and what to do."""


class Library:
    """One variant, loaded. There is one per process: TensorRT keeps the first logger it is given."""

    def __init__(self, backend: str) -> None:
        """Imports the package; `load_library` is the way to get one."""
        self.backend = backend
        self.variant = VARIANTS[backend]
        try:
            self.module = importlib.import_module(backend)
        except ImportError as error:
            raise BackendError(
                f"{self.variant.title} is not installed; install it with: {self.variant.install}"
            ) from error
        self.messages: list[tuple[str, str]] = []
        """Severity (ERROR, WARNING, INFO) and text of what the library said since `clear_messages`."""
        self.logger = self._make_logger()
        self.version: str = self.module.__version__

    @functools.cached_property
    def runtime(self) -> Any:
        """TensorRT's runtime."""
        return self.module.Runtime(self.logger)

    def clear_messages(self) -> None:
        """Empties `messages`."""
        self.messages.clear()

    def reason(self) -> str:
        """The last error that the library logged, on one line."""
        errors = [text for severity, text in self.messages if severity.endswith("ERROR")]
        return " ".join(errors[-1].split()) if errors else "it does not say why"

    def rebuild_command(self, target: str) -> str:
        """The command that builds a bundle for a target again."""
        targets = f" --targets {target}" if self.variant.targets else ""
        return f"'{BUILD_COMMAND} --backend {self.backend}{targets}'"

    def _make_logger(self) -> Any:
        module, messages = self.module, self.messages
        kept = {severity: severity.name for severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR)}
        kept |= {severity: severity.name for severity in (module.ILogger.WARNING, module.ILogger.INFO)}

        class Logger(module.ILogger):  # type: ignore[misc, name-defined]
            """Keeps what the library says, for refusals and for the sizes that only its log tells."""

            def log(self, severity: Any, text: str) -> None:
                if severity in kept:
                    messages.append((kept[severity], text))

        return Logger()


@functools.cache
def load_library(backend: str) -> Library:
    """The library of a backend, one of `VARIANTS`.

    Raises:
        BackendError: it is not installed.
    """
    return Library(backend)


def check_plans(bundle: Bundle) -> Library:
    """The library for a bundle, after refusing what can be refused without a card.

    Raises:
        BackendError: the library is not installed.
        BundleError: a plan is of another version, damaged, or not a plan.
    """
    library = load_library(bundle.manifest.backend)
    check_version(library, bundle)
    for graph in bundle.manifest.graphs:
        check_header(library, bundle, graph)
    return library


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


def check_card(library: Library, bundle: Bundle, card: Card) -> None:
    """Refuses plans that were built on another kind of card. TensorRT for RTX tells by the header.

    Raises:
        BundleError: they were.
    """
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
        BundleError: the plan is damaged, of another version or for another card, or is not a plan.
    """
    runtime = library.runtime
    if not hasattr(runtime, "get_engine_validity"):
        return
    with bundle.graph_file(graph).open("rb") as file:
        header = file.read(runtime.engine_header_size)
    validity, diagnostics = runtime.get_engine_validity(header)
    # without a driver the library says "invalid" and gives no reason; what follows says it better
    if validity == library.module.EngineValidity.INVALID and diagnostics:
        raise header_refusal(library, bundle, graph, diagnostics)


def header_refusal(library: Library, bundle: Bundle, graph: str, diagnostics: int) -> BundleError:
    """The refusal for the diagnostic bits of a plan's header."""
    bits = library.module.EngineInvalidityDiagnostics
    found = [name for name in _DIAGNOSTICS if diagnostics & int(getattr(bits, name))]
    text = "; ".join(_DIAGNOSTICS[name] for name in found) or f"the library says {diagnostics:#x}"
    target = bundle.manifest.target
    meaning = text.format(
        title=library.variant.title,
        package=library.backend,
        target=target,
        rebuild=library.rebuild_command(target),
    )
    return BundleError(f"the plan '{bundle.graph_file(graph)}' cannot be used: {meaning}")


def loading_refusal(library: Library, bundle: Bundle, graph: str) -> BackendError | BundleError:
    """The refusal for a plan that the library did not open, from what it logged."""
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
