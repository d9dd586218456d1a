"""What can be set of a server: one table for the command line's flags and the TOML file's keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engines.options import EngineOptions
from runtime.errors import InputError
from runtime.toml_file import read_values
from runtime.validation import Limits

BATCHING = ("continuous", "static")
"""When waiting samples join: between any two steps, or only when the batch is empty."""

LOG_LEVELS = ("debug", "info", "warning", "error")


def _setting(default: Any, help: str, **flag: Any) -> Any:
    """A field whose flag is described by the arguments of `argparse`."""
    return field(default=default, metadata={"help": help, **flag})


def _size(default: int, help: str) -> Any:
    """A field for an amount of memory: bytes, or a string like 6G."""
    return _setting(default, help, metavar="SIZE", is_size=True)


@dataclass(frozen=True)
class Settings:
    """Everything that can be set about a server. Names are those of the TOML file; flags have dashes."""

    bundle: str = _setting(
        "",
        "directory of the bundle; $ANYDOOR_BUNDLE, else build/engines/anydoor, if unset",
        metavar="DIR",
    )
    require_signature: bool = _setting(False, "serve a bundle only if it is signed by the trusted key")
    trusted_key: str = _setting(
        "", "PEM file with the Ed25519 public key of who signs bundles", metavar="FILE"
    )
    engine: EngineOptions = EngineOptions()
    """Where and how the graphs run. Its fields have flags and keys beside the others."""
    listen: tuple[str, ...] = _setting(
        ("127.0.0.1:50051",),
        "address, host:port or unix:/path; may be repeated",
        metavar="ADDRESS",
    )
    metrics: str = _setting("", "address for Prometheus, host:port; none if not given", metavar="ADDRESS")
    tls_certificate: str = _setting("", "PEM file with the server's certificate chain", metavar="FILE")
    tls_key: str = _setting("", "PEM file with its private key", metavar="FILE")
    tls_client_ca: str = _setting(
        "", "PEM file; only clients with a certificate signed by it are let in", metavar="FILE"
    )
    tokens: str = _setting(
        "", "file with bearer tokens, one per line; only callers with one are let in", metavar="FILE"
    )
    max_message_bytes: int = _size(32 << 20, "of a request, like 32M")
    max_pixels: int = _setting(1 << 24, "pixels of each picture and mask", metavar="N")
    max_steps: int = _setting(100, "steps of a request", metavar="N")
    max_images: int = _setting(8, "pictures of a request", metavar="N")
    max_placements: int = _setting(4, "placements of a request", metavar="N")
    max_previews: int = _setting(4, "previews of each picture", metavar="N")
    queue: int = _setting(16, "requests accepted beyond as many as the batch has slots", metavar="N")
    max_batch: int = _setting(
        0,
        "most samples in the batch; 0: the bundle's limit, on a card at most 4, which have most of the gain: "
        "on an H100 8.00 ms per sample alone, 6.07 for 2, 5.34 for 4, 5.03 for 8 (6 %% more)",
        metavar="N",
    )
    batching: str = _setting("continuous", "static admits only into an empty batch", choices=BATCHING)
    workers: int = _setting(2, "threads that decode, prepare, paste and encode", metavar="N")
    control_window: int = _setting(
        0,
        "steps whose detail maps are computed in one call; 0: the bundle's batch on a card, 1 on a CPU",
        metavar="N",
    )
    cache_bytes: int = _size(
        -1,
        "for detail maps, like 2G, if there is room; -1: an eighth of the machine's, at most 4 GiB",
    )
    drain_seconds: float = _setting(
        30.0, "after SIGTERM, time to finish what was accepted", metavar="SECONDS"
    )
    log_level: str = _setting("info", "least severe lines to log", choices=LOG_LEVELS)

    @property
    def limits(self) -> Limits:
        """What a request may ask for."""
        return Limits(self.max_steps, self.max_images, self.max_placements, self.max_pixels)

    def check(self) -> None:
        """Refuses values that no server can have.

        Raises:
            InputError: names the setting.
        """
        sizes = ("max_message_bytes", "max_pixels", "max_steps", "max_images", "max_placements")
        positive = (*sizes, "workers")
        not_negative = ("max_previews", "queue", "max_batch", "control_window", "drain_seconds")
        for names, least in ((positive, 1), (not_negative, 0), (("cache_bytes",), -1)):
            for name in names:
                if getattr(self, name) < least:
                    raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for setting in fields(self):
            choices, value = setting.metadata.get("choices"), getattr(self, setting.name)
            if choices and value not in choices:
                raise InputError(f"{setting.name} must be one of {', '.join(choices)}, not '{value}'")
        if not self.listen:
            raise InputError("listen must name at least one address")
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise InputError("tls_certificate and tls_key are only of use together")
        if self.require_signature != bool(self.trusted_key):
            raise InputError("require_signature and trusted_key are only of use together")
        if self.tls_client_ca and not self.tls_certificate:
            raise InputError("tls_client_ca needs tls_certificate and tls_key")


def settings_from(given: Mapping[str, Any], config: Path | None, default_bundle: str) -> Settings:
    """Makes the settings of a server.

    Args:
        given: setting -> value, of the flags; those of `EngineOptions` stand beside the others.
        config: a TOML file with the same names; flags take precedence.
        default_bundle: the bundle where neither names one.

    Raises:
        AnyDoorError: the file cannot be read, or a value cannot be used.
    """
    read = read_values(config, (Settings, EngineOptions), "the configuration") if config else {}
    values = {"bundle": default_bundle, **read, **given}
    engine = {
        option.name: values.pop(option.name) for option in fields(EngineOptions) if option.name in values
    }
    values["listen"] = tuple(values.get("listen", Settings.listen))
    settings = Settings(engine=EngineOptions(**engine), **values)
    settings.check()
    return settings
