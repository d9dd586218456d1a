"""Opens and verifies bundles: directories with a manifest, the graphs and the constants of a checkpoint.

manifest.json       what this is, what it was made from, and the hash of every other file (`engines.manifest`)
constants.npz       noise schedule, and what a system needs besides its graphs
merges.txt          the tokenizer, of a bundle that takes prompts
NAME.onnx           the graphs, with their weights beside them; or NAME.plan
NAME.onnx.data
...
checkpoint.rest     optional, not in the manifest: what the graphs lack of the checkpoint
                    (`export.restore_checkpoint`)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from engines.arrays import read_arrays
from engines.errors import BundleError
from engines.files import put_back
from engines.manifest import (
    ANY_TARGET,
    BUILD_COMMAND,
    MANIFEST,
    ONNX,
    FileRecord,
    GraphRecord,
    Manifest,
    read_manifest,
)
from engines.onnx_file import external_data
from engines.verified import FileState

CONSTANTS = "constants.npz"
MERGES = "merges.txt"
REST = "checkpoint.rest"
RESTORE_COMMAND = "python -m export.restore_checkpoint"

SCHEDULE = "alphas_cumprod"
_TIMESTEPS = 1000

_LARGEST_SMALL_FILE = 64 << 20
"""Bytes; those of the full size have one megabyte."""

_State = tuple[int, int, int]
"""Inode, modification time and size of a file."""

Progress = Callable[[int], object]
"""Called with the number of bytes just read."""


class ReplacedError(BundleError):
    """Another bundle has taken the place of the one that was opened."""


@dataclass
class Bundle:
    """An opened bundle. Opening reads the manifest only; `verify` compares the hashes of a graph's files."""

    path: Path
    manifest: Manifest
    signed: bool = False
    """Whether the manifest's signature was checked. Then all files are read, whatever was found before."""
    _verified: dict[str, tuple[FileState, ...]] = field(default_factory=dict)
    """Graph -> its files as they were when they were found sound."""
    _opened: _State | None = None
    """The manifest's file as it was when it was read; None if it was not."""

    @classmethod
    def open(cls, path: str | Path, trusted_key: Path | None = None) -> Bundle:
        """Opens a bundle and checks that every file is there with the size it should have.

        Where a build was killed while it replaced the bundle, the old one is put back first.

        Args:
            path: its directory.
            trusted_key: PEM file; the bundle must be signed by its owner. None: no signature is needed.

        Raises:
            BundleError: there is no bundle, it is damaged, of a newer version, or not signed by the key; or
                it is replaced all the time.
            BackendError: a signature is needed, and cryptography is not installed.
        """
        path = Path(path)
        if not path.is_dir():
            put_back(path)
        if not path.is_dir():
            raise BundleError(f"there is no bundle at '{path}': build one with '{BUILD_COMMAND}'")
        for last in (False, False, True):
            opened = _state(path / MANIFEST)
            manifest = read_manifest(path / MANIFEST, trusted_key)
            bundle = cls(path, manifest, signed=trusted_key is not None, _opened=opened)
            try:
                for record in bundle.files():
                    bundle._check_size(record)
                break
            except ReplacedError:
                if last:
                    raise
        return bundle

    def files(self) -> list[FileRecord]:
        """Returns every file but the manifest."""
        graphs = self.manifest.graphs.values()
        return [*self.small_files(), *(record for graph in graphs for record in graph.all_files)]

    def small_files(self) -> list[FileRecord]:
        """Returns every file but the manifest and those of the graphs."""
        tokenizer = self.manifest.tokenizer
        return [self.manifest.constants, *([tokenizer.merges] if tokenizer else [])]

    def graph_file(self, graph: str, target: str = ANY_TARGET) -> Path:
        """Returns the file to load for a graph: the variant for a target if there is one."""
        record = self.manifest.graphs[graph]
        return self.path / record.variants.get(target, record.files[0]).path

    def verify(self, graph: str, progress: Progress | None = None, reread: bool = False) -> None:
        """Compares the hashes of a graph's files, and what files it names.

        Files that were found sound before and have not changed are not read (`engines.verified`; of a signed
        bundle, by this object).

        Args:
            graph: which one.
            progress: told of every block that is read.
            reread: read all files, whatever was found before.

        Raises:
            BundleError: a file is not the one that was built, or names one that the manifest does not list.
        """
        record = self.manifest.graphs[graph]
        states = tuple(self._file_state(file) for file in record.all_files)
        if self._verified.get(graph) == states and not reread:
            return
        for file in record.all_files:
            self._verify_file(file, progress, reread or self.signed)
        if self.manifest.backend == ONNX:
            for file in (record.files[0], *record.variants.values()):
                self._check_weights(file, record)
        self._verified[graph] = states

    def verify_all(self, progress: Progress | None = None) -> None:
        """Reads all files and compares their hashes, whatever was found before.

        Raises:
            BundleError: a file is not the one that was built, or cannot be used.
        """
        for graph in self.manifest.graphs:
            self.verify(graph, progress, reread=True)
        for record in self.small_files():
            self.read(record)
        self.constants()

    def constants(self) -> dict[str, NDArray[np.float32]]:
        """Returns name -> array: `alphas_cumprod` (1000,) float32, and what the bundle's system keeps there.

        A segmenter has none.

        Raises:
            BundleError: the file is damaged.
        """
        record = self.manifest.constants
        try:
            constants = read_arrays(self.read(record))
        except ValueError as error:
            raise self._damaged(record, f"cannot be read ({error})") from error
        if self.manifest.is_segmenter:
            return constants
        schedule = constants.get(SCHEDULE)
        if schedule is None or schedule.shape != (_TIMESTEPS,) or schedule.dtype != np.float32:
            raise self._damaged(record, f"has no {SCHEDULE} ({_TIMESTEPS},) float32")
        if schedule.min() < 0 or schedule.max() > 1 or np.any(np.diff(schedule) > 0):
            raise self._damaged(record, f"has {SCHEDULE} that do not fall from 1 to 0")
        return constants

    def read(self, record: FileRecord) -> bytes:
        """Returns the content of a small file: what was compared is what is returned.

        Raises:
            BundleError: it is not the file that was built, or is not small.
        """
        if record.bytes > _LARGEST_SMALL_FILE:
            raise self._damaged(record, f"has more than {_LARGEST_SMALL_FILE >> 20} MiB")
        try:
            content = (self.path / record.path).read_bytes()
        except OSError as error:
            raise self._damaged(record, f"cannot be read ({error.strerror})") from error
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise self._damaged(record, "is not the file that was built (its hash differs)")
        return content

    def _check_size(self, record: FileRecord) -> None:
        file = self.path / record.path
        if not file.is_file():
            raise self._damaged(record, "is missing")
        if not file.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(
                f"the bundle at '{self.path}' cannot be loaded: {record.path} is a link to a file outside of "
                "it; copy the bundle with the files that its links lead to, as 'cp -rL' does"
            )
        if file.stat().st_size != record.bytes:
            raise self._damaged(record, f"has {file.stat().st_size} bytes instead of {record.bytes}")

    def _verify_file(self, record: FileRecord, progress: Progress | None, reread: bool) -> None:
        state = self._file_state(record)
        if reread or not state.is_verified():
            self._check_hash(record, progress)
            state.remember()

    def _file_state(self, record: FileRecord) -> FileState:
        try:
            return FileState.of(self.path / record.path, record.sha256)
        except OSError as error:
            raise self._damaged(record, f"cannot be read ({error.strerror})") from error

    def _check_hash(self, record: FileRecord, progress: Progress | None) -> None:
        try:
            found = sha256(self.path / record.path, progress=progress)
        except OSError as error:
            raise self._damaged(record, f"cannot be read ({error.strerror})") from error
        if found != record.sha256:
            raise self._damaged(record, "is not the file that was built (its hash differs)")

    def _check_weights(self, file: FileRecord, record: GraphRecord) -> None:
        """Refuses a graph that takes weights from elsewhere than the files that its record lists.

        The libraries read whatever file a graph names, and only what is listed has a hash.
        """
        listed = {PurePosixPath(other.path): other.bytes for other in record.files[1:]}
        folder = PurePosixPath(file.path).parent
        try:
            found = list(external_data((self.path / file.path).read_bytes()))
        except (OSError, ValueError) as error:
            raise self._damaged(file, f"is not an ONNX file ({error})") from error
        for weights in found:
            size = listed.get(folder / weights.location)
            if size is None:
                where = f"'{weights.location}', which the manifest does not list"
                raise self._damaged(file, f"takes weights from {where}")
            if min(weights.offset, weights.length) < 0 or weights.offset + weights.length > size:
                raise self._damaged(file, f"takes weights from beyond the end of '{weights.location}'")

    def _damaged(self, record: FileRecord, what: str) -> BundleError:
        if self._opened is not None and _state(self.path / MANIFEST) != self._opened:
            return ReplacedError(
                f"the bundle at '{self.path}' was replaced after it was opened: load it again"
            )
        return BundleError(
            f"the bundle at '{self.path}' is damaged: {record.path} {what}; "
            f"copy it again or rebuild it with '{BUILD_COMMAND}'"
        )


def sha256(*paths: Path, progress: Progress | None = None) -> str:
    """Returns the hexadecimal hash of a file, or of several in a row."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while block := file.read(1 << 22):
                digest.update(block)
                if progress:
                    progress(len(block))
    return digest.hexdigest()


def _state(file: Path) -> _State | None:
    """Tells a file from one that has taken its place; None if there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def no_checkpoint(path: Path) -> str:
    """Returns the sentence that says that a checkpoint is missing, with the command that restores it from the
    bundle beside it, the folder X of X.safetensors, if there is one."""
    sentence, bundle = f"there is no checkpoint at '{path}'", path.with_suffix("")
    if path.suffix != ".safetensors" or not (bundle / REST).is_file():
        return sentence
    return f"{sentence}: restore it with '{RESTORE_COMMAND} {bundle}'"


def file_record(bundle: Path, name: str) -> FileRecord:
    """Returns the manifest's entry for a file that was just written."""
    return FileRecord(name, (bundle / name).stat().st_size, sha256(bundle / name))
