"""Reads videos: two frames of one instance (YouTube-VOS, MOSE, VIPSeg, YouTube-VIS, UVO, BURST)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.data.masks import Mask
from training.data.pairs import Kind, Shot
from training.data.sources.base import (
    Source,
    SourceError,
    decode_segmentation,
    decoding,
    read_labels,
    read_picture,
)

LEAST_AREA = 0.005
"""Share of a frame that an instance must cover."""


def choose_frames(count: int, rng: Generator, window: int | None = None) -> tuple[int, int]:
    """Chooses two frames, not next to each other if there is a choice, so that the object has moved.

    With a window, of IMPRINT's section 3.1, any two that are at most so far apart; one twice if it is 0.
    """
    if window is not None:
        first = int(rng.integers(count))
        near = [frame for frame in range(count) if 0 < abs(frame - first) <= window]
        return first, int(rng.choice(near)) if near else first
    gap = int(rng.integers(max(1, count // 4), max(2, count)))
    first = int(rng.integers(count - gap)) if gap < count else 0
    pair = (first, min(first + gap, count - 1))
    return pair if rng.random() < 0.5 else pair[::-1]


class LabelledVideos(Source):
    """Folders of frames and folders of label maps with the same names; one number per instance."""

    kind: Kind = "video"
    frames: tuple[str, ...] = ("train", "JPEGImages")
    labels: tuple[str, ...] = ("train", "Annotations")

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._frames, self._labels = self.existing(*self.frames), self.existing(*self.labels)
        self.videos = sorted(folder.name for folder in self._labels.iterdir() if folder.is_dir())
        self.not_empty(self.videos, "video")

    def __len__(self) -> int:
        return len(self.videos)

    def pair(self, index: int, rng: Generator) -> tuple[Shot, Shot]:
        """Reads two frames that both show one instance."""
        video = self.videos[index]
        files = sorted((self._labels / video).glob("*.png"))
        if len(files) < 2:
            raise SourceError(f"{self._labels / video} has fewer than two label maps")
        chosen = [files[frame] for frame in choose_frames(len(files), rng, self.window)]
        maps = [read_labels(file) for file in chosen]
        instance = rng.choice(self.instances(maps, video))
        first, second = (
            Shot(read_picture(self._frames / video / f"{file.stem}.jpg"), labels == instance)
            for file, labels in zip(chosen, maps, strict=True)
        )
        return first, second

    def instances(self, maps: Sequence[NDArray[np.int64]], video: str) -> list[int]:
        """Finds the labels that are large enough in every map; 0 is the background."""
        found = [set(np.unique(labels).tolist()) - {0, 255} for labels in maps]
        common = set.intersection(*found)
        large = [n for n in sorted(common) if all((labels == n).mean() > LEAST_AREA for labels in maps)]
        if not large:
            raise SourceError(f"the two frames of {video} share no instance")
        return large


class YouTubeVOS(LabelledVideos):
    """YouTube-VOS: train/JPEGImages/VIDEO/00000.jpg, train/Annotations/VIDEO/00000.png."""

    either_side = False


class MOSE(LabelledVideos):
    """MOSE, in the format of YouTube-VOS."""

    released_kind = "multi-view"


class VIPSeg(LabelledVideos):
    """VIPSeg, as its own scripts prepare it for training: made smaller, panoptic numbers as colours.

    VIPSeg_720P/images/VIDEO/00000000.jpg, VIPSeg_720P/panomasksRGB/VIDEO/00000000.png.
    """

    frames = ("VIPSeg_720P", "images")
    labels = ("VIPSeg_720P", "panomasksRGB")


@dataclass(frozen=True)
class Track:
    """One instance through a video."""

    files: tuple[str, ...]
    segmentations: tuple[Any, ...]  # None where it is not seen
    size: tuple[int, int]  # (height, width)

    def __post_init__(self) -> None:
        if len(self.segmentations) > len(self.files):
            raise ValueError(f"{len(self.segmentations)} masks for {len(self.files)} frames")

    @property
    def seen(self) -> list[int]:
        """Frames in which the instance can be seen."""
        return [frame for frame, segmentation in enumerate(self.segmentations) if segmentation]


class TrackedVideos(Source):
    """A JSON file of tracks beside a folder of frames."""

    kind = "video"
    frames: tuple[str, ...]
    annotations: tuple[str, ...]

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._frames = self.existing(*self.frames)
        path = self.existing(*self.annotations)
        with decoding(f"{type(self).__name__}: {path}"):
            self.tracks = [t for t in self.read_tracks(self.read_index(path)) if len(t.seen) > 1]
        self.not_empty(self.tracks, "track with two frames")

    def __len__(self) -> int:
        return len(self.tracks)

    def read_tracks(self, content: dict[str, Any]) -> list[Track]:
        """Reads tracks as YouTube-VIS writes them: videos, and annotations with a mask per frame."""
        videos = {video["id"]: video for video in content["videos"]}
        tracks = []
        for annotation in content["annotations"]:
            video = videos[annotation["video_id"]]
            size = (video["height"], video["width"])
            tracks.append(Track(tuple(video["file_names"]), tuple(annotation["segmentations"]), size))
        return tracks

    def pair(self, index: int, rng: Generator) -> tuple[Shot, Shot]:
        """Reads two frames in which the track is seen."""
        track = self.tracks[index]
        seen = track.seen
        first, second = (
            self._shot(track, seen[frame]) for frame in choose_frames(len(seen), rng, self.window)
        )
        return first, second

    def _shot(self, track: Track, frame: int) -> Shot:
        mask: Mask = decode_segmentation(track.segmentations[frame], track.size)
        return Shot(read_picture(self._frames / track.files[frame]), mask)


class YouTubeVIS(TrackedVideos):
    """YouTube-VIS: train/JPEGImages/VIDEO/00000.jpg and train/instances.json."""

    either_side = False
    frames = ("train", "JPEGImages")
    annotations = ("train", "instances.json")


class UVO(TrackedVideos):
    """UVO, dense: frames in uvo_videos_dense_frames/, tracks in VideoDenseSet/UVO_video_train_dense.json."""

    either_side = False
    frames = ("uvo_videos_dense_frames",)
    annotations = ("VideoDenseSet", "UVO_video_train_dense.json")


class BURST(TrackedVideos):
    """BURST: frames/train/SET/VIDEO/*.jpg and annotations/train/train.json, masks by frame and track."""

    frames = ("frames", "train")
    annotations = ("annotations", "train", "train.json")

    def read_tracks(self, content: dict[str, Any]) -> list[Track]:
        """Reads sequences with one dictionary of track number -> run lengths per annotated frame."""
        tracks = []
        for sequence in content["sequences"]:
            folder = f"{sequence['dataset']}/{sequence['seq_name']}"
            files = tuple(f"{folder}/{name}" for name in sequence["annotated_image_paths"])
            size = (sequence["height"], sequence["width"])
            for number in sequence["track_category_ids"]:
                runs = [frame.get(number) for frame in sequence["segmentations"]]
                segmentations = tuple(r and {"size": list(size), "counts": r["rle"]} for r in runs)
                tracks.append(Track(files, segmentations, size))
        return tracks
