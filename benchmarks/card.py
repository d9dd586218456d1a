"""Everything that only a card can show, unattended and offline, in about seven minutes.

    python benchmarks/card.py                 # on a machine with an NVIDIA card
    python benchmarks/card.py --device cpu    # rehearses it with the tiny network, in a minute

Runs from a clone; of packages it needs NumPy, Pillow and onnxruntime-gpu. Parts that need others (PyTorch,
gRPC, TensorRT) say so where those are not installed. The network has the full size and weights of noise.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # the project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    from benchmarks.support.card import models
    from benchmarks.support.card.page import page
    from benchmarks.support.card.runner import Runner
    from benchmarks.support.card.task import NETWORKS, Task
    from benchmarks.support.machine import describe
    from benchmarks.support.peaks import CARDS, Peak
    from benchmarks.support.power import PowerMeter
    from benchmarks.support.results import RESULTS, require_writable, write_results
    from engines.backends.onnxruntime.engine import devices
    from engines.errors import AnyDoorError, BackendError
    from engines.files import write_text
    from engines.manifest import MANIFEST, read_manifest
    from runtime.errors import InputError
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"card.py: the package '{error.name}' is missing: pip install numpy pillow", file=sys.stderr)
    sys.exit(2)

BUNDLES = Path("build/card")

SECONDS = {
    "pictures": 30,
    "memory": 20,
    "pytorch": 35,
    "pytorch-compiled": 220,
    "parity": 25,
    "graphs": 35,
    "server": 60,
    "tensorrt": 10,
}
"""Part -> its share of the budget. What a part leaves over, the later ones get; what it takes too much, they
lose, but no more than half of their own."""


def say(text: str) -> None:
    """Print what goes on, or what is wrong."""
    print(f"card.py: {text}", file=sys.stderr, flush=True)


def find_bundles(folder: Path, device: str) -> None:
    """Make what is missing or out of date, if that is possible here, and give weights to skeletons.

    What stays missing fails where it is needed: the other parts can go on.
    """
    for name in models.outdated(folder, device):
        try:
            say(f"making '{folder / name}'")
            models.make(folder, name)
        except ModuleNotFoundError as error:
            state = "missing" if name in models.missing(folder, device) else "of other code than this"
            say(
                f"'{folder / name}' is {state} and cannot be made here, '{error.name}' is not installed: "
                "copy it from a machine where 'python benchmarks/card.py --prepare' made it"
            )
    say("filling skeletons with noise")
    models.fill_skeletons(folder, device)


def describe_run(options: argparse.Namespace) -> dict[str, Any]:
    """Return the head of the results: machine, network, and what the limits are computed from."""
    machine = describe()
    card = str(machine.get("card", "")).partition(",")[0] if options.device == "cuda" else ""
    bundle = options.bundles / NETWORKS[options.device]
    manifest = read_manifest(bundle / MANIFEST)
    flops: dict[str, float] = {}
    reason = "" if card in CARDS else f"the rates of {card or 'a CPU'} are not in benchmarks/support/peaks.py"
    try:
        flops = models.flops_per_row(bundle)
    except (AnyDoorError, ModuleNotFoundError) as error:
        reason = str(error)
    return {
        "command": shlex.join(["python", "benchmarks/card.py", *options.arguments]),
        "date": date.today().isoformat(),
        "card": card,
        "machine": machine,
        "network": {
            "size": bundle.name,
            **{name: getattr(manifest, name) for name in ("precision", "target", "resolution", "max_batch")},
            "fingerprint": models.made_by(bundle),
        },
        "budget": options.budget,
        "peak": None if reason else asdict(CARDS[card]),
        "no_limit": reason,
        "flops_per_row": flops,
    }


def unused(path: Path) -> Path:
    """Return a path, or with -2, -3, ... after its name if there is such a file."""
    others = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], others) if not each.exists())


def measure(options: argparse.Namespace) -> Path:
    """Measure all parts, write the results after each, and return the file.

    Raises:
        AnyDoorError: there is no card, or no network to measure.
    """
    device, started = options.device, time.monotonic()
    if device not in devices():
        raise BackendError(
            f"the installed ONNX Runtime has no {device} provider: pip install onnxruntime-gpu, or rehearse "
            "with --device cpu"
        )
    require_writable(options.output / "card.json")
    find_bundles(options.bundles, device)
    results = describe_run(options)
    slug = re.sub(r"\W+", "-", results["card"].lower() or device)
    path = unused(options.output / f"card-{slug}-{results['date']}.json")
    peak = Peak(**results["peak"]) if results["peak"] else None
    parts: list[dict[str, Any]] = []
    end = time.monotonic() + options.budget
    with PowerMeter() as meter:
        runner = Runner(meter, peak, results["flops_per_row"])
        for index, part in enumerate(options.parts):
            share = SECONDS[part] / sum(SECONDS[name] for name in options.parts[index:])
            least = options.budget * SECONDS[part] / sum(SECONDS.values()) / 2
            seconds = max((end - time.monotonic()) * share, least)
            task = Task(part, device, str(options.bundles.resolve()), seconds)
            for found in runner.run(task):
                # what was measured stays, whatever comes
                results |= {"seconds": time.monotonic() - started, "parts": [*parts, found]}
                write_results(path, results)
                write_text(path.with_suffix(".md"), page(results))
            parts.append(found)
    return path


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="card.py",
        description="Measure what only a card can show, beside the card's limit: pictures against PyTorch, "
        "graphs, a server under load, parity, what TensorRT says.",
        epilog="examples:\n"
        "  python benchmarks/card.py --prepare          # makes what is measured, to be copied to a card\n"
        "  python benchmarks/card.py\n"
        "  python benchmarks/card.py --parts pictures graphs --budget 90\n"
        "  python benchmarks/card.py --device cpu --budget 50\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--device", choices=tuple(NETWORKS), default="cuda", help="cpu rehearses with the tiny network"
    )
    result.add_argument(
        "--parts",
        nargs="+",
        choices=tuple(SECONDS),
        default=list(SECONDS),
        help="default: all, in this order",
    )
    result.add_argument(
        "--budget",
        type=float,
        default=sum(SECONDS.values()),
        metavar="SECONDS",
        help="for all parts; a slow card repeats less and may take longer (default: %(default)s)",
    )
    result.add_argument(
        "--bundles",
        type=Path,
        default=BUNDLES,
        metavar="DIR",
        help="skeletons and bundles; what is missing is made, if PyTorch is there (default: %(default)s)",
    )
    result.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the results, JSON and a page (default: benchmarks/results; of a rehearsal: build)",
    )
    result.add_argument(
        "--prepare", action="store_true", help="make all skeletons and bundles anew, and measure nothing"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print where the results are; returns 0, 2 if it cannot, or 130 if it was stopped."""
    options = parser().parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else list(arguments)
    options.output = options.output or (RESULTS if options.device == "cuda" else BUNDLES.parent)
    try:
        if not options.budget > 0:
            raise InputError(f"--budget must be more than 0, not {options.budget:g}")
        if options.prepare:
            for name in models.needed("cuda"):
                say(f"making '{options.bundles / name}'")
                models.make(options.bundles, name)
            return 0
        path = measure(options)
    except AnyDoorError as error:
        say(str(error))
        return 2
    except ModuleNotFoundError as error:
        say(f"the package '{error.name}' is missing: pip install '.[export]'")
        return 2
    except KeyboardInterrupt:
        say("stopped; the parts that were done are in the results")
        return 130
    print(path.with_suffix(".md").read_text("utf-8"))
    print(f"{path} and {path.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    # stopped like by Ctrl-C, it takes the part that runs along
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
