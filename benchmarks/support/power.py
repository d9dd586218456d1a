"""Measures electric power and device memory while something runs, where the platform reports them.

NVIDIA cards     nvidia-smi: power and used memory of the first card
Jetson           tegrastats: power of the module, or of all the rails it names
Intel, AMD CPUs  RAPL counters of the processor packages (readable by root on most systems)
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

INTERVAL_SECONDS = 0.2

_PATIENCE_SECONDS = 10.0
"""For the first readings."""

POWERCAP = Path("/sys/class/powercap")

_RAIL = re.compile(r"(V\w+) (\d+)mW/")


@dataclass(frozen=True)
class Reading:
    """One reading."""

    at: float
    """On the monotonic clock."""
    watts: float
    device_mb: float | None = None
    """Used memory of the card, of all processes, in 10^6 bytes."""


def parse_nvidia_smi(line: str, at: float) -> Reading | None:
    """Parse a line of `nvidia-smi --query-gpu=power.draw,memory.used --format=csv,noheader,nounits`."""
    try:
        watts, mebibytes = (float(field) for field in line.split(","))
    except ValueError:
        return None
    return Reading(at, watts, mebibytes * 2**20 / 1e6)


def parse_tegrastats(line: str, at: float) -> Reading | None:
    """Parse a line of `tegrastats`; VDD_IN, the input of the module, includes all other rails."""
    rails = {name: int(milliwatts) / 1000 for name, milliwatts in _RAIL.findall(line)}
    if not rails:
        return None
    return Reading(at, rails.get("VDD_IN", sum(rails.values())))


_NVIDIA = "nvidia-smi"

_COMMANDS: dict[str, tuple[list[str], Callable[[str, float], Reading | None]]] = {
    _NVIDIA: (
        [
            *(_NVIDIA, "--id=0", "--query-gpu=power.draw,memory.used"),
            *("--format=csv,noheader,nounits", f"--loop-ms={INTERVAL_SECONDS * 1000:.0f}"),
        ],
        parse_nvidia_smi,
    ),
    "tegrastats": (["tegrastats", "--interval", f"{INTERVAL_SECONDS * 1000:.0f}"], parse_tegrastats),
}
"""Program -> its command, and the function that parses a line of its output."""


class RaplCounters:
    """The sum of the energy counters of all processor packages."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self._packages = [
            package
            for package in sorted(root.glob("intel-rapl:*"))
            if package.name.count(":") == 1 and _readable(package / "energy_uj")
        ]
        self._last: dict[Path, int] = {}
        self._last_at = 0.0

    def __bool__(self) -> bool:
        return bool(self._packages)

    def read(self, at: float) -> Reading | None:
        """Return the mean power since the last call; None the first time."""
        joules = 0.0
        for package in self._packages:
            now = int((package / "energy_uj").read_text("ascii"))
            microjoules = now - self._last.get(package, now)
            if microjoules < 0:
                microjoules += int((package / "max_energy_range_uj").read_text("ascii"))
            joules += microjoules / 1e6
            self._last[package] = now
        before, self._last_at = self._last_at, at
        return Reading(at, joules / (at - before)) if before else None


def _readable(path: Path) -> bool:
    try:
        return bool(path.read_text("ascii"))
    except OSError:
        return False


class PowerMeter:
    """Reads power while it is entered; a context manager."""

    def __init__(self) -> None:
        self.source = next((name for name in _COMMANDS if shutil.which(name)), "")
        """nvidia-smi, tegrastats, RAPL, or empty where the platform reports nothing."""
        self._rapl = RaplCounters()
        if not self.source and self._rapl:
            self.source = "RAPL"
        self.readings: list[Reading] = []
        self._patience = _PATIENCE_SECONDS
        self._process: subprocess.Popen[str] | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._collect, daemon=True)

    def __enter__(self) -> PowerMeter:
        if self.source in _COMMANDS:
            command, _ = _COMMANDS[self.source]
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        if self.source:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end.set()
        if self._process:
            self._process.terminate()
            self._process.wait()
        if self.source:
            self._thread.join()

    def settle(self) -> None:
        """Wait until the memory of the card was read without the processes that have ended.

        Does nothing where it is not read; waits 10 s at most.
        """
        # the first line may have been read before they ended
        needed = len(self.readings) + 2
        until = time.monotonic() + self._patience
        while self.source == _NVIDIA and self._thread.is_alive() and time.monotonic() < until:
            if len(self.readings) >= needed:
                return
            time.sleep(INTERVAL_SECONDS / 4)
        if not self.readings:
            # it will not say more later
            self._patience = 0.0

    def joules(self, started: float, seconds: float) -> float | None:
        """Return the energy of an interval; None if nothing was read in it."""
        return joules(self.readings, started, seconds)

    def device_mb(self, started: float, ended: float) -> float | None:
        """Return the largest used memory of the card in an interval, minus what was used before it.

        None without readings before it and in it: see `settle`.
        """
        return device_mb(self.readings, started, ended)

    def _collect(self) -> None:
        for reading in self._from_program() if self._process else self._from_counters():
            self.readings.append(reading)

    def _from_program(self) -> Iterator[Reading]:
        assert self._process is not None
        assert self._process.stdout is not None
        _, parse = _COMMANDS[self.source]
        for line in self._process.stdout:
            reading = parse(line, time.monotonic())
            if reading:
                yield reading

    def _from_counters(self) -> Iterator[Reading]:
        while not self._end.wait(INTERVAL_SECONDS):
            reading = self._rapl.read(time.monotonic())
            if reading:
                yield reading


def joules(readings: Iterable[Reading], started: float, seconds: float) -> float | None:
    """Return the mean power of the readings in an interval, times its length; None if there are none."""
    watts = [reading.watts for reading in readings if started <= reading.at <= started + seconds]
    return sum(watts) / len(watts) * seconds if watts else None


def device_mb(readings: Iterable[Reading], started: float, ended: float) -> float | None:
    """Return the largest used memory in an interval minus the last before it; None without both."""
    known = [(reading.at, reading.device_mb) for reading in readings if reading.device_mb is not None]
    during = [megabytes for at, megabytes in known if started <= at <= ended]
    before = [megabytes for at, megabytes in known if at < started]
    return max(during) - before[-1] if during and before else None
