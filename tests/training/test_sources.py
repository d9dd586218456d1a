"""Every reader on a miniature of its data set, in the published folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.data.sources import SOURCES, Source, SourceError
from training.data.sources.base import decode_segmentation
from training.data.sources.videos import choose_frames

HEIGHT, WIDTH = 24, 32
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[6:16, 8:20] = True


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(path)


def labels(path: Path, values: np.ndarray) -> None:  # type: ignore[type-arg]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def palette_labels(path: Path, values: np.ndarray) -> None:  # type: ignore[type-arg]
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8), mode="P")
    image.putpalette([n * 31 % 256 for n in range(768)])
    image.save(path)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def run_lengths(mask: np.ndarray) -> list[int]:  # type: ignore[type-arg]
    flat = np.concatenate([[False], mask.T.ravel(), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return [int(n) for n in (runs[:-1] if runs[-1] == 0 else runs)]


def compressed(mask: np.ndarray) -> str:  # type: ignore[type-arg]
    """COCO's encoder, after the description in its C sources."""
    text, runs = "", run_lengths(mask)
    for index, run in enumerate(runs):
        value = run - (runs[index - 2] if index > 2 else 0)
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + (bits | (32 if more else 0)))
    return text


def segmentation() -> dict[str, Any]:
    return {"size": [HEIGHT, WIDTH], "counts": compressed(MASK)}


def youtube_vos(root: Path) -> None:
    for frame in (0, 5, 10):
        picture(root / f"train/JPEGImages/0a7b/{frame:05d}.jpg", frame)
        palette_labels(root / f"train/Annotations/0a7b/{frame:05d}.png", MASK * 3)


def vipseg(root: Path) -> None:
    for frame in range(2):
        picture(root / f"imgs/12_abc/{frame:08d}.jpg", frame)
        colours = np.zeros((HEIGHT, WIDTH, 3))
        colours[MASK] = (17, 2, 1)
        labels(root / f"panomasksRGB/12_abc/{frame:08d}.png", colours)


def tracks(root: Path, folder: str, annotations: str) -> None:
    names = [f"v1/{frame:05d}.jpg" for frame in range(3)]
    for frame, name in enumerate(names):
        picture(root / folder / name, frame)
    video = {"id": 4, "height": HEIGHT, "width": WIDTH, "file_names": names}
    runs = {"size": [HEIGHT, WIDTH], "counts": run_lengths(MASK)}
    track = {"id": 9, "video_id": 4, "segmentations": [runs, None, segmentation()]}
    write(root / annotations, {"videos": [video], "annotations": [track]})


def burst(root: Path) -> None:
    names = [f"frame{frame:04d}.jpg" for frame in (1, 31)]
    for frame, name in enumerate(names):
        picture(root / "frames/train/LaSOT/cat-1" / name, frame)
    sequence = {
        "dataset": "LaSOT",
        "seq_name": "cat-1",
        "height": HEIGHT,
        "width": WIDTH,
        "annotated_image_paths": names,
        "track_category_ids": {"1": 13},
        "segmentations": [{"1": {"rle": compressed(MASK)}} for _ in names],
    }
    write(root / "annotations/train/train.json", {"sequences": [sequence]})


def mvimgnet(root: Path) -> None:
    for view in (1, 2):
        picture(root / f"7/0b00/images/{view:03d}.jpg", view)
        labels(root / f"mask/7/0b00/{view:03d}.jpg.png", MASK * 255)


def viton(root: Path) -> None:
    picture(root / "train/cloth/00001_00.jpg")
    picture(root / "train/image/00001_00.jpg", 1)
    labels(root / "train/cloth-mask/00001_00.jpg", MASK * 255)
    palette_labels(root / "train/image-parse-v3/00001_00.png", MASK * 5)


def fashion_tryon(root: Path) -> None:
    """The persons' label maps go three pixels beyond the clothes; two poses, one stored as a colour."""
    garment = root / "train/0a1b"
    picture(garment / "target.jpg")
    labels(garment / "mask.jpg", MASK * 255)
    generous = np.zeros((HEIGHT, WIDTH))
    generous[3:19, 5:23] = 7
    for pose, stored in {"1": generous, "2": np.dstack([generous] * 3)}.items():
        picture(garment / f"{pose}.jpg", int(pose))
        labels(garment / pose / "segment.png", stored)


def salient(root: Path, images: str, masks: str, name: str = "one", mask_name: str = "one") -> None:
    picture(root / images / f"{name}.jpg")
    labels(root / masks / f"{mask_name}.png", MASK * 255)


def lvis(root: Path) -> None:
    picture(root / "train2017/000000000042.jpg")
    annotation = {"image_id": 42, "area": 120.0, "segmentation": [[8, 6, 19, 6, 19, 15, 8, 15]]}
    small = {"image_id": 42, "area": 1.0, "segmentation": [[0, 0, 1, 0, 1, 1]]}
    image = {"id": 42, "height": HEIGHT, "width": WIDTH}
    write(root / "lvis_v1_train.json", {"images": [image], "annotations": [annotation, small]})


def sam(root: Path) -> None:
    picture(root / "sa_000000/sa_7.jpg")
    annotations = [{"area": 120, "segmentation": segmentation()}, {"area": 2, "segmentation": None}]
    write(
        root / "sa_000000/sa_7.json",
        {"image": {"height": HEIGHT, "width": WIDTH}, "annotations": annotations},
    )


MINIATURES: dict[str, Callable[[Path], None]] = {
    "YouTubeVOS": youtube_vos,
    "YouTubeVIS": lambda root: tracks(root, "train/JPEGImages", "train/instances.json"),
    "UVO": lambda root: tracks(root, "uvo_videos_dense_frames", "VideoDenseSet/UVO_video_train_dense.json"),
    "MOSE": youtube_vos,
    "VIPSeg": vipseg,
    "BURST": burst,
    "MVImgNet": mvimgnet,
    "VitonHD": viton,
    "FashionTryon": fashion_tryon,
    "MSRA10K": lambda root: salient(root, "Imgs", "Imgs"),
    "DUT": lambda root: salient(root, "DUTS-TR-Image", "DUTS-TR-Mask"),
    "HFlickr": lambda root: salient(root, "real_images", "masks", "f100", "f100_1"),
    "LVIS": lvis,
    "SAM": sam,
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_miniature_gives_pairs(name: str, tmp_path: Path) -> None:
    MINIATURES[name](tmp_path)
    source: Source = SOURCES[name](tmp_path)
    assert len(source) == 1
    for seed in range(5):
        for shot in source.pair(0, np.random.default_rng(seed)):
            assert shot.image.shape == (HEIGHT, WIDTH, 3)
            assert shot.image.dtype == np.uint8
            assert np.array_equal(shot.mask, MASK)


@pytest.mark.parametrize("name", SOURCES)
def test_another_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "something_else").mkdir()
    with pytest.raises(SourceError, match=name):
        SOURCES[name](tmp_path)


def test_a_file_of_another_structure_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train/JPEGImages").mkdir(parents=True)
    write(tmp_path / "train/instances.json", {"images": []})
    with pytest.raises(SourceError, match=r"instances\.json has another structure"):
        SOURCES["YouTubeVIS"](tmp_path)


@pytest.mark.parametrize("seed", range(20))
def test_compressed_run_lengths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((37, 53)) < rng.uniform(0.02, 0.98)
    for counts in (compressed(mask), run_lengths(mask)):
        assert np.array_equal(decode_segmentation({"size": [37, 53], "counts": counts}, (0, 0)), mask)


def test_run_lengths_that_do_not_cover_the_picture_are_refused() -> None:
    with pytest.raises(SourceError, match="cover 5 pixels"):
        decode_segmentation({"size": [3, 3], "counts": [2, 3]}, (3, 3))


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_frames_are_apart(count: int) -> None:
    pairs = [choose_frames(count, np.random.default_rng(seed)) for seed in range(200)]
    assert all(
        first != second and 0 <= min(first, second) <= max(first, second) < count for first, second in pairs
    )
    assert {first < second for first, second in pairs} == {True, False}
    assert min(abs(first - second) for first, second in pairs) >= count // 4
