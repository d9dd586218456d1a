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
from training.data.sources.base import decode_segmentation, read_labels, read_mask, read_picture
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
        picture(root / f"VIPSeg_720P/images/12_abc/{frame:08d}.jpg", frame)
        colours = np.zeros((HEIGHT, WIDTH, 3))
        colours[MASK] = (17, 2, 1)
        labels(root / f"VIPSeg_720P/panomasksRGB/12_abc/{frame:08d}.png", colours)


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


def ppr10k(root: Path) -> None:
    """Two photos of one group, and a group of one, which has no pair."""
    for number, name in enumerate(("0_0", "0_1", "12_0")):
        picture(root / f"train/target_a/{name}.tif", number)
        labels(root / f"train/masks/{name}.png", MASK * 255)


def objaverse(root: Path) -> None:
    for view in range(2):
        colours = np.random.default_rng(view).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        labels(root / f"0a1b/{view:03d}.png", np.dstack([colours, MASK * 255]))


def stills(root: Path) -> None:
    picture(root / "images/one.jpg")
    labels(root / "masks/one.png", MASK * 255)
    labels(root / "masks/other.png", MASK * 255)  # of no picture


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
    "Stills": stills,
    "PPR10K": ppr10k,
    "Objaverse": objaverse,
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


INDICES = {
    "YouTubeVIS": "train/instances.json",
    "UVO": "VideoDenseSet/UVO_video_train_dense.json",
    "BURST": "annotations/train/train.json",
    "LVIS": "lvis_v1_train.json",
}


@pytest.mark.parametrize(
    "content", ['{"licenses": []}', "[1, 2]", '{"images": [{"id": 1}]}', '{"images"', "\x80"]
)
@pytest.mark.parametrize("name", INDICES)
def test_a_file_of_another_structure_is_refused(name: str, content: str, tmp_path: Path) -> None:
    MINIATURES[name](tmp_path)
    (tmp_path / INDICES[name]).write_bytes(content.encode("latin-1"))
    with pytest.raises(SourceError, match=rf"^{name}: .*\.json is damaged or has another structure"):
        SOURCES[name](tmp_path)


def test_a_track_with_more_masks_than_frames_is_refused(tmp_path: Path) -> None:
    tracks(tmp_path, "train/JPEGImages", "train/instances.json")
    path = tmp_path / "train/instances.json"
    content = json.loads(path.read_text())
    content["videos"][0]["file_names"].pop()
    write(path, content)
    with pytest.raises(SourceError, match="3 masks for 2 frames"):
        SOURCES["YouTubeVIS"](tmp_path)


@pytest.mark.parametrize("name", ["MVImgNet", "SAM", "FashionTryon", "LVIS", "YouTubeVIS"])
def test_what_takes_long_to_open_says_so(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MINIATURES[name](tmp_path)
    SOURCES[name](tmp_path)
    assert f"{name}: " in capsys.readouterr().err


def test_filters_and_timesteps_are_the_released_code_s() -> None:
    """As `check_region_size` of each data set there does it; BURST is not there."""
    released = {
        name: source for name, source in SOURCES.items() if name not in ("Stills", "PPR10K", "Objaverse")
    }
    both = {name for name, source in released.items() if not source.either_side}
    assert both == {"YouTubeVOS", "YouTubeVIS", "UVO", "MVImgNet", "VitonHD", "FashionTryon"}
    videos = {name for name, source in SOURCES.items() if source.kind == "video"}
    assert videos == {"YouTubeVOS", "YouTubeVIS", "UVO", "MOSE", "VIPSeg", "BURST"}
    assert {name: source.released_kind for name, source in SOURCES.items() if source.released_kind} == {
        "MOSE": "multi-view"
    }


def test_damaged_files_are_told(tmp_path: Path) -> None:
    sam(tmp_path)
    source, rng = SOURCES["SAM"](tmp_path), np.random.default_rng(0)
    index = tmp_path / "sa_000000/sa_7.json"
    for content in (
        index.read_bytes()[:-30],
        b"[]",
        b'{"image": {"height": "a", "width": 2}, "annotations": [{}]}',
    ):
        index.write_bytes(content)
        with pytest.raises(SourceError, match=r"sa_7\.json is damaged"):
            source.pair(0, rng)


def test_damaged_pictures_are_told(tmp_path: Path) -> None:
    labels(tmp_path / "ok.png", MASK)
    (tmp_path / "short.png").write_bytes((tmp_path / "ok.png").read_bytes()[:-30])
    Image.fromarray(np.zeros((4, 4, 2), np.uint8), "LA").save(tmp_path / "two_channels.png")
    (tmp_path / "text.png").write_text("hello")
    for read in (read_picture, read_labels, read_mask):
        with pytest.raises(SourceError, match=r"short\.png cannot be read: "):
            read(tmp_path / "short.png")
        with pytest.raises(SourceError, match=r"text\.png is no picture that can be read$"):
            read(tmp_path / "text.png")
    with pytest.raises(SourceError, match=r"two_channels\.png is damaged"):
        read_labels(tmp_path / "two_channels.png")


@pytest.mark.parametrize("seed", range(20))
def test_compressed_run_lengths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((37, 53)) < rng.uniform(0.02, 0.98)
    for counts in (compressed(mask), run_lengths(mask)):
        assert np.array_equal(decode_segmentation({"size": [37, 53], "counts": counts}, (0, 0)), mask)


def test_run_lengths_that_do_not_cover_the_picture_are_refused() -> None:
    with pytest.raises(SourceError, match="cover 5 pixels"):
        decode_segmentation({"size": [3, 3], "counts": [2, 3]}, (3, 3))


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [3, 3], "counts": [12, -3]},  # negative, though they sum up
        {"size": [3, 3], "counts": [10**30]},  # far more than fits into memory
        {"size": [3, 3], "counts": []},
        {"size": [3, 3], "counts": [4.5, 4.5]},
        {"size": [3, 3], "counts": "Q"},  # says that more follows
        {"size": [3, 3], "counts": None},
        {"size": [3], "counts": [9]},
        {"counts": [9]},
        [[1, 1, 2, 2, 1]],
        [[1, 1]],
        [["a", "b", "c", "d", "e", "f"]],
        [3],
        None,
    ],
    ids=str,
)
def test_damaged_segmentations_are_told(segmentation: Any) -> None:
    with pytest.raises(SourceError):
        decode_segmentation(segmentation, (3, 3))


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_frames_are_apart(count: int) -> None:
    pairs = [choose_frames(count, np.random.default_rng(seed)) for seed in range(200)]
    assert all(
        first != second and 0 <= min(first, second) <= max(first, second) < count for first, second in pairs
    )
    assert {first < second for first, second in pairs} == {True, False}
    assert min(abs(first - second) for first, second in pairs) >= count // 4


@pytest.mark.parametrize("count", [2, 5, 40])
@pytest.mark.parametrize("window", [1, 7])
def test_frames_lie_within_a_window(count: int, window: int) -> None:
    pairs = [choose_frames(count, np.random.default_rng(seed), window) for seed in range(200)]
    apart = {second - first for first, second in pairs}
    assert apart == {n for n in range(1 - count, count) if 0 < abs(n) <= window}
    assert {first for first, _ in pairs} == set(range(count))


def test_a_window_of_nothing_is_one_frame_twice() -> None:
    pairs = [choose_frames(9, np.random.default_rng(seed), 0) for seed in range(20)]
    assert all(first == second for first, second in pairs)


def test_a_data_set_keeps_to_its_window(tmp_path: Path) -> None:
    """Views are numbered by their brightness."""
    for view in range(20):
        path = tmp_path / f"0a1b/{view:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4, 4), view, np.uint8)).save(path)
    source = SOURCES["Objaverse"](tmp_path)
    source.window = 7
    seen = [
        [shot.image[0, 0, 0] for shot in source.pair(0, np.random.default_rng(seed))] for seed in range(50)
    ]
    assert max(abs(int(one) - int(other)) for one, other in seen) == 7


def test_views_without_transparency_are_told(tmp_path: Path) -> None:
    for view in range(2):
        picture(tmp_path / f"0a1b/{view:03d}.png")
    with pytest.raises(SourceError, match=r"000\.png has no transparency|001\.png has no transparency"):
        SOURCES["Objaverse"](tmp_path).pair(0, np.random.default_rng(0))
