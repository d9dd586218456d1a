"""Defines the server's settings, as one table for the command line's flags and the TOML file's keys."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engines.options import EngineOptions
from runtime.diffusion.ddim import MAX_STEPS
from runtime.errors import InputError
from runtime.imaging.decoding import MAX_PIXELS
from runtime.toml_file import read_values
from runtime.validation import MAX_IMAGES, MAX_PLACEMENTS, Limits

BATCHING = ("continuous", "static")
"""When waiting samples join: between any two steps, or only when the batch is empty."""

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)")
"""NAME=DIR; a directory whose own name has such a beginning is written with a / before it."""

_ADDRESS = re.compile(r"unix(-abstract)?:.+|.+:(?P<port>\d{1,9})")

LOG_LEVELS = ("debug", "info", "warning", "error")


def _setting(default: Any, help: str, **flag: Any) -> Any:
    """Returns a field whose flag is described by the arguments of `argparse`."""
    return field(default=default, metadata={"help": help, **flag})


def _size(default: int, help: str) -> Any:
    """Returns a field for an amount of memory: bytes, or a string like 6G."""
    return _setting(default, help, metavar="SIZE", is_size=True)


@dataclass(frozen=True)
class Settings:
    """Settings of a server. Names are those of the TOML file; flags have dashes."""

    bundle: tuple[str, ...] | str = _setting(
        "",
        "directory of a bundle (default: $ANYDOOR_BUNDLE, else build/engines/anydoor). May be repeated: "
        "requests select one by NAME (default: that of the directory), or get the first. The others are "
        "loaded on their first request; if --memory-budget has no room for all, the least recently used is "
        "unloaded",
        metavar="[NAME=]DIR",
    )
    segmenter: tuple[str, ...] = _setting(
        (),
        "directory of a segmenter's bundle, which finds objects; may be repeated: one for the main object "
        "of a picture, one for clicks",
        metavar="DIR",
    )
    filler: str = _setting(
        "",
        "directory of a bundle of Stable Diffusion for inpainting, or of IMPRINT, that fills the holes of "
        "edits (default: the model itself if it can, else the background is guessed)",
        metavar="DIR",
    )
    require_signature: bool = _setting(False, "serve a bundle only if it is signed by the trusted key")
    trusted_key: str = _setting(
        "", "PEM file with the Ed25519 public key that bundles are signed with", metavar="FILE"
    )
    engine: EngineOptions = EngineOptions()
    """Where and how the graphs run. Its fields have flags and keys of their own."""
    listen: tuple[str, ...] = _setting(
        ("127.0.0.1:50051",),
        "address for gRPC, host:port or unix:/path; may be repeated",
        metavar="ADDRESS",
    )
    http: str = _setting(
        "",
        "address for HTTP, host:port (default: no HTTP; anydoor studio: 127.0.0.1:8000)",
        metavar="ADDRESS",
    )
    studio: bool = _setting(False, "serve a page at /studio, over HTTP, to try the model in a browser")
    cors: tuple[str, ...] = _setting(
        (),
        "origin whose web pages may call over HTTP, like https://example.org; may be repeated",
        metavar="ORIGIN",
    )
    host: tuple[str, ...] = _setting(
        (),
        "name that a proxy or a page uses for this server over HTTP, besides localhost; may be repeated. "
        "Other names are then refused. At a loopback address without tokens, all names but localhost are "
        "refused by default",
        metavar="NAME",
    )
    job_folder: str = _setting(
        "", "folder for results of jobs over HTTP (default: they are kept in request_memory)", metavar="DIR"
    )
    job_folder_bytes: int = _size(
        10 << 30,
        "most bytes of results in job_folder, like 10G; those of earlier servers go first, then the oldest "
        "of the client with most",
    )
    insecure: bool = _setting(
        False, "allow addresses beyond this machine without TLS, or without tokens or client certificates"
    )
    metrics: str = _setting(
        "",
        "address for Prometheus metrics at /metrics, and for health at /readyz and /healthz, host:port "
        "(default: none)",
        metavar="ADDRESS",
    )
    metrics_token: bool = _setting(False, "require a token for metrics, too")
    tls_certificate: str = _setting("", "PEM file with the server's certificate chain", metavar="FILE")
    tls_key: str = _setting("", "PEM file with its private key", metavar="FILE")
    tls_client_ca: str = _setting(
        "", "PEM file with a CA; clients need a certificate that it signed", metavar="FILE"
    )
    tokens: str = _setting(
        "", "file with bearer tokens, one per line; clients need one of them", metavar="FILE"
    )
    max_message_bytes: int = _size(32 << 20, "largest request, like 32M")
    max_pixels: int = _setting(1 << 24, "most pixels of a picture or mask", metavar="N")
    max_steps: int = _setting(100, "most steps of a request", metavar="N")
    max_images: int = _setting(8, "most pictures of a request", metavar="N")
    max_placements: int = _setting(4, "most placements of a request", metavar="N")
    max_previews: int = _setting(4, "most previews of a picture, over all its placements", metavar="N")
    max_connections: int = _setting(1000, "most simultaneous connections", metavar="N")
    share_caches: bool = _setting(
        False,
        "share cached ID tokens and detail maps between clients. From the time that their requests take, "
        "clients can then tell whether somebody used the same object recently",
    )
    queue: int = _setting(16, "most requests that wait beyond the slots of the batch", metavar="N")
    max_batch: int = _setting(
        0,
        "most samples in the batch; 0: the bundle's limit, on a card at most 4 (8 gain 6 %% more on an H100)",
        metavar="N",
    )
    batching: str = _setting(
        "continuous",
        "continuous: requests join between steps; static: they join an empty batch only",
        choices=BATCHING,
    )
    request_memory: int = _size(
        -1, "most memory of all requests and answers, like 4G; -1: a quarter of the machine's, at least 1 GiB"
    )
    transfer_seconds: float = _setting(
        30.0, "time to send a message or receive an answer, plus a second per MiB", metavar="SECONDS"
    )
    decode_seconds: float = _setting(
        10.0, "processor time to decode the pictures of a request", metavar="SECONDS"
    )
    workers: int = _setting(
        2, "threads that prepare, paste and encode, each with a decoding process", metavar="N"
    )
    control_window: int = _setting(
        0,
        "steps whose detail maps are computed in one call; 0: the bundle's batch on a card, 1 on a CPU",
        metavar="N",
    )
    cache_bytes: int = _size(
        -1,
        "most memory of the detail maps of all models, like 2G, if there is room; -1: an eighth of the "
        "machine's, at most 4 GiB",
    )
    drain_seconds: float = _setting(30.0, "time to finish accepted requests after SIGTERM", metavar="SECONDS")
    log_level: str = _setting("info", "lowest level to log (anydoor studio: warning)", choices=LOG_LEVELS)

    @property
    def bundles(self) -> Mapping[str, Path]:
        """Maps names to bundle directories; the first is the default.

        Raises:
            InputError: two have the same name.
        """
        named: dict[str, Path] = {}
        for text in (self.bundle,) if isinstance(self.bundle, str) else self.bundle:
            found = _NAMED.fullmatch(text)
            path = Path(found[2] if found else text)
            name = found[1] if found else path.resolve().name
            if name in named:
                raise InputError(
                    f"bundle: '{named[name]}' and '{path}' are both called '{name}': give one of them "
                    f"another name, like other={path}"
                )
            named[name] = path
        return named

    @property
    def limits(self) -> Limits:
        """The limits of a request."""
        return Limits(self.max_steps, self.max_images, self.max_placements, self.max_pixels)

    @property
    def memory_for_requests(self) -> int:
        """Bytes that all requests and answers may take."""
        if self.request_memory >= 0:
            return self.request_memory
        try:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            memory = 0
        return max(memory // 4, 1 << 30)

    def check(self) -> None:
        """Checks all values.

        Raises:
            InputError: names the setting.
        """
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:  # neither is NaN
                raise InputError(f"{name} must be at least {least} and at most {most}, not {value}")
        for setting in fields(self):
            choices, value = setting.metadata.get("choices"), getattr(self, setting.name)
            if choices and value not in choices:
                raise InputError(f"{setting.name} must be one of {', '.join(choices)}, not '{value}'")
        if not self.bundles:
            raise InputError("bundle must name at least one directory")
        if not self.listen:
            raise InputError("listen must name at least one address")
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise InputError("tls_certificate and tls_key must be given together")
        if self.require_signature != bool(self.trusted_key):
            raise InputError("require_signature and trusted_key must be given together")
        if self.tls_client_ca and not self.tls_certificate:
            raise InputError("tls_client_ca needs tls_certificate and tls_key")
        self._check_http()
        if self.metrics_token and not self.tokens:
            raise InputError("metrics_token needs tokens")
        # a message is parsed, and its fields are copied
        if self.memory_for_requests < 3 * self.max_message_bytes:
            raise InputError(
                f"request_memory must be at least three times max_message_bytes ({self.max_message_bytes}), "
                f"not {self.memory_for_requests}"
            )
        self._check_addresses()

    def _check_http(self) -> None:
        for name in ("studio", "cors", "host", "job_folder"):
            if getattr(self, name) and not self.http:
                raise InputError(f"{name} needs http")
        for origin in self.cors:
            if not re.fullmatch(r"\*|https?://[^/\s]+", origin):
                raise InputError(f"cors: an origin is * or like https://example.org, not '{origin}'")
        for name in self.host:
            if not re.fullmatch(r"\[?[\w.:-]+\]?", name) or re.search(r"^[^:]*:\d+$", name):
                raise InputError(f"host: a name or an address is expected, without a port, not '{name}'")
        if self.job_folder and not os.path.isdir(self.job_folder):
            raise InputError(f"job_folder: there is no folder '{self.job_folder}'")

    def _check_addresses(self) -> None:
        """Refuses invalid addresses, and those that others can reach without TLS and authentication."""
        for address in self.listen:
            found = _ADDRESS.fullmatch(address)
            # of a larger port gRPC takes the lower 16 bits
            if not found or int(found["port"] or 0) >= 1 << 16:
                raise InputError(f"listen must be host:port or unix:/path, not '{address}'")
        if self.insecure:
            return
        guarded = self.tls_certificate and (self.tokens or self.tls_client_ca)
        for address in filter(None, (*self.listen, self.http)):
            # what has no port is refused when it is bound
            if ":" not in address:
                continue
            if not guarded and not is_local(address):
                raise InputError(
                    f"{'http' if address == self.http else 'listen'}: '{address}' can be reached from other "
                    "machines. That needs tls_certificate, "
                    "tls_key and tokens (or tls_client_ca); or set insecure, on a trusted network"
                )
        if ":" in self.metrics and not self.metrics_token and not is_local(self.metrics):
            raise InputError(
                f"metrics: '{self.metrics}' can be reached from other machines, which needs metrics_token "
                "and tokens; or set insecure, on a trusted network"
            )


_LARGEST_INT = 2**31 - 1  # of gRPC's options
_RANGES: Mapping[str, tuple[float, float]] = {
    "max_message_bytes": (1, _LARGEST_INT),
    "max_pixels": (1, MAX_PIXELS),
    "max_steps": (1, MAX_STEPS),
    "max_images": (1, MAX_IMAGES),
    "max_placements": (1, MAX_PLACEMENTS),
    "max_previews": (0, 1000),
    "max_connections": (1, 100_000),
    "queue": (0, 10_000),
    "max_batch": (0, 1024),
    "workers": (1, 256),
    "control_window": (0, 1024),
    "cache_bytes": (-1, 2**62),
    "request_memory": (-1, 2**62),
    "job_folder_bytes": (1, 2**62),
    "transfer_seconds": (0.1, 86_400),
    "decode_seconds": (0.1, 86_400),
    "drain_seconds": (0, 86_400),
}


def is_local(address: str) -> bool:
    """Returns whether only this machine reaches an address, host:port or unix:/path."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def settings_from(given: Mapping[str, Any], config: Path | None, defaults: Mapping[str, Any]) -> Settings:
    """Makes the settings of a server.

    Args:
        given: setting -> value, of the flags; those of `EngineOptions` stand beside the others.
        config: a TOML file with the same names; flags take precedence.
        defaults: settings, the bundle among them, where neither has them.

    Raises:
        AnyDoorError: the file cannot be read, or a value cannot be used.
    """
    read = read_values(config, (Settings, EngineOptions), "the configuration") if config else {}
    values = {**defaults, **read, **given}
    engine = {
        option.name: values.pop(option.name) for option in fields(EngineOptions) if option.name in values
    }
    values |= {
        name: tuple(values[name]) for name in ("listen", "cors", "host", "segmenter") if name in values
    }
    if not isinstance(values["bundle"], str):
        values["bundle"] = tuple(values["bundle"])
    settings = Settings(engine=EngineOptions(**engine), **values)
    settings.check()
    return settings
