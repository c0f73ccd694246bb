"""Data sets as users name them: what they hold, and what is said when they are missing, broken or odd."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import re
import socket
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import thriftnet as tn
from images import arrays, cifar_files, class_folders, parquet_files, picture, png
from thriftnet.data import decode
from thriftnet.data.dataset import ArrayImages, DataSource, ImageDataset, Subset, TorchImages
from thriftnet.data.folder import FolderImages
from thriftnet.data.parquet import ParquetImages
from thriftnet.data.sources import open_data
from thriftnet.data.split import train_validation

SHARED = Path(__file__).parents[2] / "shared" / "data"


def pixels(dataset: ImageDataset, index: int) -> torch.Tensor:
    return torch.from_numpy(np.array(dataset.image(index)))


def numbered(number: int) -> torch.Tensor:
    return torch.from_numpy(np.array(picture(number)))


def imagenet_folders(root: Path) -> Path:
    class_folders(root / "train")
    class_folders(root / "val", per_class=2)
    return root


def test_the_bundled_digits():
    source = open_data("digits")
    assert source.input_size == (1, 8, 8)
    assert (len(source.splits["train"]), len(source.splits["test"])) == (1347, 450)
    assert source.splits["train"].resident().max() == 16 * 15
    assert source.splits["test"].image(0).mode == "L"


def test_class_folders_with_splits(tmp_path: Path):
    source = open_data(f"folder:{imagenet_folders(tmp_path)}")
    assert source.classes == ("cat", "dog")
    assert {name: split.labels.tolist() for name, split in source.splits.items()} == {
        "train": [0] * 5 + [1] * 5,
        "val": [0, 0, 1, 1],
    }
    assert torch.equal(pixels(source.splits["train"], 7), numbered(7))
    assert torch.equal(source.splits["train"].resident(torch.tensor([7]))[0].permute(1, 2, 0), numbered(7))
    assert source.input_size == (3, 12, 12)
    assert source.mean == (0.485, 0.456, 0.406)
    assert source.split("test") is source.splits["val"]
    with pytest.raises(tn.ConfigError, match=r"no split 'dev': expected train, val"):
        source.split("dev")


def test_class_folders_without_splits_are_split_by_class(tmp_path: Path):
    source = open_data(f"folder:{class_folders(tmp_path, per_class=10)}")
    assert [split.labels.tolist() for split in source.splits.values()] == [[0] * 8 + [1] * 8, [0, 0, 1, 1]]
    again = open_data(f"folder:{tmp_path}")
    assert torch.equal(pixels(source.splits["test"], 0), pixels(again.splits["test"], 0))


def test_class_folders_of_a_test_split_alone(tmp_path: Path):
    class_folders(tmp_path / "test")
    assert list(open_data(f"folder:{tmp_path}").splits) == ["test"]


def test_folders_within_classes_hidden_ones_and_other_files(tmp_path: Path):
    root = class_folders(tmp_path, per_class=4)
    (root / "dog" / "deeper").mkdir()
    (root / "dog" / "deeper" / "x.PNG").write_bytes(png(99))
    (root / "dog" / "notes.txt").write_text("no image")
    (root / ".cache").mkdir()
    splits = open_data(f"folder:{root}").splits.values()
    assert sum(len(split) for split in splits) == 9


def test_links_to_folders_above_or_read_before_are_not_followed(tmp_path: Path):
    root = class_folders(tmp_path / "pets", per_class=4)
    (root / "dog" / "loop").symlink_to(root / "dog", target_is_directory=True)
    (root / "dog" / "up").symlink_to(root, target_is_directory=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "9.png").write_bytes(png(9))
    for name in ("linked", "twice"):
        (root / "cat" / name).symlink_to(elsewhere, target_is_directory=True)
    splits = open_data(f"folder:{root}").splits.values()
    assert torch.cat([split.labels for split in splits]).bincount().tolist() == [5, 4]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = class_folders(tmp_path, per_class=4)
    scandir = os.scandir

    def refuse(place: object) -> object:
        if str(place).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(tn.DataError, match=r"dog cannot be read: Permission denied"):
        open_data(f"folder:{root}")


def test_hidden_files_are_no_images(tmp_path: Path):
    root = class_folders(tmp_path, per_class=4)
    (root / "dog" / "._0.png").write_bytes(b"Mac OS X")
    (root / "dog" / ".ipynb_checkpoints").mkdir()
    (root / "dog" / ".ipynb_checkpoints" / "0.png").write_bytes(png(0))
    assert sum(len(split) for split in open_data(f"folder:{root}").splits.values()) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "train" / "owl").symlink_to("nowhere"), r"owl is a link to nothing"),
        (lambda root: (root / "val" / "cat" / "deeper").symlink_to("deeper"), r"deeper is a link to nothing"),
        (lambda root: (root / "val" / "cat" / "9.png").mkdir(), r"9\.png is a folder, named as an image"),
        (lambda root: [path.unlink() for path in (root / "val" / "cat").iterdir()], r"val/cat has no images"),
        (lambda root: (root / "validation").mkdir(), r"has two folders for the val split, val and validation"),
        (lambda root: (root / "Valid").mkdir(), r"has two folders for the val split"),
        (lambda root: class_folders(root / "train", 2, ("caf\udce9",)), r"'caf\\udce9', which is not text in UTF-8"),
        (lambda root: [class_folders(root / "train", 2, (name,)) for name in ("\xe9", "e\u0301")], "has two classes named"),
    ],
)
def test_folders_in_which_images_would_be_missing_or_mixed_up_are_refused(tmp_path: Path, change: Any, message: str):
    change(imagenet_folders(tmp_path))
    with pytest.raises(tn.DataError, match=message):
        open_data(f"folder:{tmp_path}")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_pipes_in_place_of_files_are_refused_without_waiting(tmp_path: Path):
    imagenet_folders(tmp_path)
    os.mkfifo(tmp_path / "val" / "cat" / "9.png")
    val = open_data(f"folder:{tmp_path}").split("val")
    with pytest.raises(tn.DataError, match=r"9\.png cannot be decoded: it is a device or pipe"):
        val.image(2)
    os.mkfifo(tmp_path / "train-0.parquet")
    with pytest.raises(tn.DataError, match=r"train-0\.parquet cannot be read: it is a device or pipe"):
        open_data(f"parquet:{tmp_path}")


def test_repeated_class_names_stay_apart(tmp_path: Path):
    source = open_data(f"parquet:{parquet_files(tmp_path, {'train': 4}, ['crane', 'crane', 'dog'])}")
    assert source.classes == ("crane (0)", "crane (1)", "dog")


def test_tables_of_which_a_file_is_missing_are_refused(tmp_path: Path):
    parquet_files(tmp_path, {"train": 4})
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "train-00000-of-00002.parquet")
    with pytest.raises(tn.DataError, match=r"has 1 of the 2 files that train-00000-of-00002\.parquet is one of"):
        open_data(f"parquet:{tmp_path}")


def test_images_of_different_sizes_have_no_common_one(tmp_path: Path):
    imagenet_folders(tmp_path)
    Image.new("RGB", (5, 9)).save(tmp_path / "train" / "cat" / "odd.png")
    source = open_data(f"folder:{tmp_path}")
    assert source.input_size is None
    with pytest.raises(tn.DataError, match=r"differ in size: \(3, 12, 12\) and \(3, 9, 5\)"):
        source.splits["train"].resident()


KINDS = {
    "png": ("L", "P", "RGBA", "1", "LA"),
    "jpg": ("L", "CMYK", "1"),
    "tif": ("L", "P", "RGBA", "CMYK", "1", "LA"),
    "gif": ("L", "P", "RGBA", "1", "LA"),
}


@pytest.mark.parametrize(("ending", "mode"), [(ending, mode) for ending, modes in KINDS.items() for mode in modes])
def test_every_kind_of_image_becomes_what_torchvision_makes_of_it(tmp_path: Path, ending: str, mode: str):
    from torchvision.datasets.folder import pil_loader

    path = tmp_path / f"image.{ending}"
    picture(1).convert(mode).save(path, **({"compression": "tiff_lzw"} if ending == "tif" else {}))
    got = FolderImages(tmp_path, [path.name], [0]).image(0)
    assert got.mode == "RGB"
    assert got.tobytes() == pil_loader(path).tobytes()


def saved(image: Image.Image, format: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **how)
    return buffer.getvalue()


ODD = {
    "16 bit": (saved(Image.fromarray(np.full((12, 12), 40_000, dtype=np.uint16)), "png"), "its pixels are I;16"),
    "fractions": (saved(Image.fromarray(np.full((12, 12), 0.5, dtype=np.float32)), "tiff"), "its pixels are F"),
    "narrow": (png(0, 1, 1001), r"its sides are 1 x 1001, more than 1 : 1000"),
    "many pixels": (saved(Image.new("1", (10_000, 10_000)), "png"), "it states 10000 x 10000 pixels"),
    "runs a program": (saved(picture(1), "eps"), "not an image that pillow can read"),
    "truncated": (saved(picture(1), "jpeg")[:-100], "image file is truncated"),
    "empty": (b"", "not an image that pillow can read"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ODD)
def test_images_without_one_right_meaning_are_refused(tmp_path: Path, kind: str):
    content, message = ODD[kind]
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(tn.DataError, match=rf"image\.png cannot be decoded: {message}"):
        FolderImages(tmp_path, ["image.png"], [0]).image(0)


@pytest.mark.parametrize("kind", ["one pixel", "animated", "another suffix"])
def test_odd_images_that_can_be_read(tmp_path: Path, kind: str):
    first = picture(1).convert("P")
    contents = {
        "one pixel": png(0, 1, 1),
        "animated": saved(first, "gif", save_all=True, append_images=[picture(2).convert("P")]),
        "another suffix": saved(picture(1), "bmp"),
    }
    (tmp_path / "image.jpg").write_bytes(contents[kind])
    image = FolderImages(tmp_path, ["image.jpg"], [0]).image(0)
    assert image.size == ((1, 1) if kind == "one pixel" else (12, 12))
    if kind == "animated":
        assert image.tobytes() == first.convert("RGB").tobytes()


def test_a_sparse_huge_file_is_not_read(tmp_path: Path):
    (tmp_path / "image.webp").write_bytes(saved(picture(1), "webp"))
    os.truncate(tmp_path / "image.webp", 1 << 40)
    with pytest.raises(tn.DataError, match=r"image\.webp cannot be decoded: it has more than 1 GiB"):
        FolderImages(tmp_path, ["image.webp"], [0]).image(0)


def test_notes_about_rotation_are_ignored_as_torchvision_does(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture(0, width=12, height=8).save(tmp_path / "image.jpg", exif=exif)
    assert FolderImages(tmp_path, ["image.jpg"], [0]).image(0).size == (12, 8)


def test_parquet_tables_in_several_row_groups(tmp_path: Path):
    source = open_data(f"parquet:{parquet_files(tmp_path, {'train': 10, 'validation': 4, 'test': 5}, ['cat', 'dog'])}")
    assert source.classes == ("cat", "dog")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 10, "val": 4, "test": 5}
    assert list(source.splits) == ["train", "val", "test"]
    train = source.splits["train"]
    for index in (9, 0, 5):
        assert torch.equal(pixels(train, index), numbered(index))
    assert train.labels.tolist() == [0, 1] * 5
    assert source.input_size == (3, 12, 12)
    copied = copy.deepcopy(train)  # as workers get it where processes are not forked
    assert torch.equal(copied.resident(), train.resident())


def test_parquet_keeps_few_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from thriftnet.data import parquet

    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)
    train = open_data(f"parquet:{parquet_files(tmp_path, {'train': 10})}").splits["train"]
    assert all(torch.equal(pixels(train, index), numbered(index)) for index in range(10))
    assert len(train._cache) == 1


def test_parquet_of_several_files_without_class_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import pyarrow

    parquet_files(tmp_path / "data", {"train": 4})
    (tmp_path / "data" / "train-00000-of-00001.parquet").rename(tmp_path / "data" / "train-00000-of-00002.parquet")
    parquet_files(tmp_path / "data", {"train": 6})
    (tmp_path / "data" / "train-00000-of-00001.parquet").rename(tmp_path / "data" / "train-00001-of-00002.parquet")
    source = open_data(f"parquet:{tmp_path}")
    assert source.classes == ("0", "1")
    train = source.splits["train"]
    assert torch.equal(pixels(train, 4 + 5), numbered(5))
    monkeypatch.setattr(ParquetImages, "_group", lambda self, group: [pyarrow.scalar(b"text")] * 3)
    with pytest.raises(tn.DataError, match=r"train-00001-of-00002\.parquet, row 5, cannot be decoded"):
        train.image(4 + 5)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, also where there is one."""

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_in_the_layout_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    folder = cifar_files(tmp_path, kind, monkeypatch.setattr)
    count = 15 if kind == "cifar10" else 3
    for place in (tmp_path, folder):
        source = open_data(f"{kind}:{place}")
        assert source.classes == ("a", "b", "c")
        assert {name: len(split) for name, split in source.splits.items()} == {"train": count, "test": 3}
        assert source.input_size == (3, 32, 32)
    first = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)[0]
    assert np.array_equal(source.splits["train"].resident()[0].numpy().ravel(), first)
    assert torch.equal(pixels(source.splits["train"], 0).permute(2, 0, 1), source.splits["train"].resident()[0])


@pytest.mark.usefixtures("offline")
def test_damaged_cifar_files_are_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = cifar_files(tmp_path, "cifar10", monkeypatch.setattr)

    class Touch:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    (folder / "data_batch_1").write_bytes(pickle.dumps(Touch()))
    with pytest.raises(tn.DataError, match="md5 sums differ"):
        open_data(f"cifar10:{tmp_path}")
    assert not (tmp_path / "executed").exists()


@pytest.mark.usefixtures("offline")
def test_missing_cifar_that_cannot_be_downloaded_leaves_nothing(tmp_path: Path):
    with pytest.raises(tn.DataError, match=r"no complete CIFAR10 .*could not be downloaded.*cifar-10-python\.tar\.gz"):
        open_data(f"cifar10:{tmp_path / 'nothing'}")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar11:x", "unknown data 'cifar11:x': did you mean"),
        ("", "unknown data ''"),
        ("digits:x", "the digits need no folder"),
        ("folder", "the folder is missing"),
        ("folder:", "the folder is missing"),
        ("hf:", "the name is missing"),
    ],
)
def test_unknown_specs_are_refused(spec: str, message: str):
    with pytest.raises(tn.ConfigError, match=message):
        open_data(spec)


def test_an_unknown_treatment_of_corrupt_images_is_refused():
    with pytest.raises(tn.ConfigError, match="Possible: error, skip"):
        open_data("digits", on_corrupt="ignore")


def test_missing_and_empty_folders_are_refused(tmp_path: Path):
    for kind in ("folder", "parquet"):
        with pytest.raises(tn.DataError, match="there is no folder"):
            open_data(f"{kind}:{tmp_path / 'nothing'}")
    with pytest.raises(tn.DataError, match="has no class folders"):
        open_data(f"folder:{tmp_path}")
    with pytest.raises(tn.DataError, match="no files named"):
        open_data(f"parquet:{tmp_path}")


def test_a_folder_of_images_has_no_labels(tmp_path: Path):
    for place, count in (("", 10), ("train", 6), ("val", 4)):
        (tmp_path / "split" / place if place else tmp_path / "flat").mkdir(parents=True)
        for i in range(count):
            (tmp_path / ("split" if place else "flat") / place / f"{i}.png").write_bytes(png(i))
    for name, sizes in (("flat", {"train": 8, "test": 2}), ("split", {"train": 6, "val": 4})):
        found = open_data(f"folder:{tmp_path / name}")
        assert {split: len(images) for split, images in found.splits.items()} == sizes
        assert (found.labelled, found.classes, found.split("train").labels.unique().tolist()) == (False, (), [0])
        assert found.split("train").image(0).size == (12, 12)
    with pytest.raises(tn.DataError, match=r"split has no labels, and evaluate needs them: a folder for each class"):
        found.require_labels("evaluate")
    class_folders(tmp_path / "split" / "val" / "more")
    with pytest.raises(tn.DataError, match=r"val has a folder 'more', and the training images have no classes"):
        open_data(f"folder:{tmp_path / 'split'}")


def test_tables_without_labels(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    for split, count in (("train", 5), ("test", 3)):
        table = pyarrow.table({"image": [{"bytes": png(i), "path": None} for i in range(count)]})
        parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    found = open_data(f"parquet:{tmp_path}")
    assert not found.labelled
    assert [len(images) for images in found.splits.values()] == [5, 3]
    assert torch.equal(torch.from_numpy(np.array(found.split("test").image(2))), numbered(2))
    parquet_files(tmp_path, {"train": 5})
    with pytest.raises(tn.DataError, match=r"in \('image', ''\)|has no column of labels named label"):
        open_data(f"parquet:{tmp_path}")


def test_one_class_is_refused(tmp_path: Path):
    with pytest.raises(tn.DataError, match="one class folder, 'cat'"):
        open_data(f"folder:{class_folders(tmp_path / 'a', names=('cat',))}")
    with pytest.raises(tn.DataError, match="at least two classes"):
        open_data(f"parquet:{parquet_files(tmp_path / 'b', {'train': 1})}")


def test_classes_without_images_and_unknown_ones_are_refused(tmp_path: Path):
    imagenet_folders(tmp_path)
    (tmp_path / "val" / "bird").mkdir()
    with pytest.raises(tn.DataError, match="class 'bird', which is not among the 2 training classes"):
        open_data(f"folder:{tmp_path}")
    (tmp_path / "val" / "bird").rename(tmp_path / "train" / "bird")
    with pytest.raises(tn.DataError, match="bird has no images"):
        open_data(f"folder:{tmp_path}")


def test_parquet_of_other_columns_labels_or_bytes_is_refused(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "train.parquet"

    def written(**columns: list[object]) -> str:
        parquet.write_table(pyarrow.table(columns), path)
        return f"parquet:{tmp_path}"

    image = {"bytes": png(0)}
    for columns, message in (
        ({"text": ["a"], "label": [0]}, r"has the columns \['text', 'label'\]"),
        ({"image": [image], "label": ["a"]}, "expected images"),
        ({"image": [image], "label": [None]}, "expected images"),
        ({"image": [image] * 2, "label": [0, None]}, "1 rows without a label"),
        ({"image": [image] * 2, "label": [0, -1]}, "the label -1"),
    ):
        with pytest.raises(tn.DataError, match=message):
            open_data(written(**columns))
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(tn.DataError, match=r"train\.parquet cannot be read: Parquet magic bytes not found"):
        open_data(f"parquet:{tmp_path}")


def test_more_labels_than_class_names_are_refused(tmp_path: Path):
    with pytest.raises(tn.DataError, match="has 1 class: at least two"):
        open_data(f"parquet:{parquet_files(tmp_path, {'train': 2}, ['cat'])}")


def broken(root: Path) -> tuple[str, str]:
    """Both layouts with the same two broken images of the test split: truncated, and no image."""
    import pyarrow
    from pyarrow import parquet

    class_folders(root / "folder" / "train", per_class=3)
    class_folders(root / "folder" / "test", per_class=3)
    (root / "folder" / "test" / "cat" / "1.png").write_bytes(png(1)[:300])
    (root / "folder" / "test" / "dog" / "2.png").write_bytes(b"text")
    parquet_files(root / "parquet", {"train": 6})
    contents = [png(0), png(1)[:300], png(2), png(3), png(4), None]
    table = pyarrow.table({"image": [{"bytes": content} for content in contents], "label": [0, 0, 0, 1, 1, 1]})
    parquet.write_table(table, root / "parquet" / "test-00000-of-00001.parquet", row_group_size=4)
    return f"folder:{root / 'folder'}", f"parquet:{root / 'parquet'}"


def test_corrupt_images_are_named(tmp_path: Path):
    folder, parquet = broken(tmp_path)
    for spec, names in (
        (folder, (r"cat.1\.png cannot be decoded", r"dog.2\.png cannot be decoded: not an image")),
        (parquet, (r"test-00000-of-00001\.parquet, row 1, cannot be decoded", "row 5, cannot be decoded: not an image")),
    ):
        images = open_data(spec).splits["test"]
        for index, name in zip((1, 5), names, strict=True):
            with pytest.raises(tn.DataError, match=name):
                images.image(index)
        with pytest.raises(tn.DataError, match=names[0]):
            images.resident()


def test_corrupt_images_are_skipped_counted_and_named(tmp_path: Path):
    for spec in broken(tmp_path):
        source = open_data(spec, on_corrupt="skip")
        assert len(source.skipped) == 2
        assert all("cannot be decoded" in line and "Repair" not in line for line in source.skipped)
        test = source.splits["test"]
        assert test.labels.tolist() == [0, 0, 1, 1]
        assert test.resident().shape == (4, 3, 12, 12)
        assert torch.equal(pixels(test, 2), numbered(3))
        assert not isinstance(source.splits["train"], Subset)


def test_a_split_of_broken_images_only_is_refused(tmp_path: Path):
    imagenet_folders(tmp_path)
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(tn.DataError, match="not one image of the val split"):
        open_data(f"folder:{tmp_path}", on_corrupt="skip")


def test_validation_images_have_the_same_share_of_each_class():
    images = arrays(count=110, classes=2)
    labels = torch.cat([torch.zeros(100), torch.ones(10)]).long()
    images.labels = labels[torch.randperm(110)]
    train, val = train_validation(images, 0.1, seed=3)
    assert torch.bincount(val.labels).tolist() == [10, 1]
    assert torch.cat([train.indices, val.indices]).sort().values.tolist() == list(range(110))
    assert torch.equal(val.indices, train_validation(images, 0.1, seed=3)[1].indices)
    assert not torch.equal(val.indices, train_validation(images, 0.1, seed=4)[1].indices)
    assert torch.equal(val.resident()[0], images.images[val.indices[0]])


def test_small_classes_are_in_both_parts_and_single_images_are_trained_on():
    images = arrays(count=6)
    images.labels = torch.tensor([0, 0, 1, 1, 2, 0])
    train, val = train_validation(images, 0.01)
    assert sorted(val.labels.tolist()) == [0, 1]
    train, val = train_validation(images, 0.99)
    assert sorted(train.labels.tolist()) == [0, 1, 2]
    images.labels = torch.arange(6)
    with pytest.raises(tn.DataError, match="no class has two"):
        train_validation(images)
    with pytest.raises(tn.ConfigError, match=r"a number in \(0, 1\)"):
        train_validation(images, 1.0)


def test_any_torch_data_set_of_images_can_be_used():
    class Mine(torch.utils.data.Dataset):
        targets = (0, 1, 0)

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return picture(index).convert("RGBA"), self.targets[index]

    mine = TorchImages(Mine(), input_size=(3, 12, 12))
    assert mine.labels.tolist() == [0, 1, 0]
    assert torch.equal(mine.resident(torch.tensor([2]))[0].permute(1, 2, 0), numbered(2))
    source = DataSource("mine", ("a", "b"), {"train": mine}, (0.5,) * 3, (0.5,) * 3)
    assert source.input_size == (3, 12, 12)
    with pytest.raises(tn.ConfigError, match="give labels"):
        TorchImages(Mine(), labels=[0])


def test_a_torch_data_set_with_a_transform_is_refused():
    pairs = torch.utils.data.TensorDataset(torch.zeros(2, 3, 4, 4), torch.zeros(2))
    with pytest.raises(tn.DataError, match="remove its transform"):
        TorchImages(pairs, labels=[0, 1]).image(0)


def test_no_images_make_an_empty_array():
    assert ImageDataset.resident(arrays(), torch.empty(0, dtype=torch.int64)).shape == (0, 3, 12, 12)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"names": ["dog", "cat"]}, "name their classes differently, or in another order"),
        ({"label": "labels"}, r"test-00000-of-00001\.parquet, row 0, has the label 7: with 2"),
        ({"content": "text"}, "expected images, a struct with `bytes`"),
        ({"description": "["}, r"test-00000-of-00001\.parquet cannot be read"),
        ({"names": 5}, "the names of its classes are not text: 5"),
        ({"rows": 0}, r"test-00000-of-00001\.parquet has no rows"),
    ],
)
def test_tables_that_do_not_fit_each_other_are_refused(tmp_path: Path, second: dict[str, Any], message: str):
    import pyarrow
    from pyarrow import parquet

    parquet_files(tmp_path, {"train": 6}, ["cat", "dog"])
    rows = second.get("rows", 4)
    images = [{"bytes": second.get("content", png(i))} for i in range(rows)]
    labels = [7 if "label" in second else i % 2 for i in range(rows)]
    table = pyarrow.table(
        {
            "image": images or pyarrow.array([], pyarrow.struct([("bytes", pyarrow.binary())])),
            "label": pyarrow.array(labels, "int64"),
        }
    )
    described = json.dumps({"info": {"features": {"label": {"names": second.get("names", ["cat", "dog"])}}}})
    table = table.replace_schema_metadata({"huggingface": second.get("description", described)})
    parquet.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(tn.DataError, match=message):
        open_data(f"parquet:{tmp_path}")


def test_files_of_one_split_have_the_same_columns(tmp_path: Path):
    from pyarrow import parquet

    parquet_files(tmp_path, {"train-0": 4, "train-1": 4})
    for number in (0, 1):
        (tmp_path / f"train-{number}-00000-of-00001.parquet").rename(tmp_path / f"train-{number}.parquet")
    assert len(open_data(f"parquet:{tmp_path}").split("train")) == 8
    table = parquet.read_table(tmp_path / "train-1.parquet")
    parquet.write_table(table.rename_columns(["image", "labels"]), tmp_path / "train-1.parquet")
    with pytest.raises(
        tn.DataError, match=r"train-1\.parquet has images and labels in \('image', 'labels'\), train-0\.parquet in"
    ):
        open_data(f"parquet:{tmp_path}")


def test_labels_without_class_names_do_not_ask_for_a_network_of_any_size(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"image": [{"bytes": png(0)}] * 2, "label": [0, 2_000_000_000]})
    parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(tn.DataError, match="has the label 2000000000, no class names, and only 2 images"):
        open_data(f"parquet:{tmp_path}")


def test_a_table_that_changes_while_it_is_used_is_an_error(tmp_path: Path):
    train = open_data(f"parquet:{parquet_files(tmp_path, {'train': 6})}").split("train")
    train.image(0)
    parquet_files(tmp_path, {"train": 9})
    with pytest.raises(tn.DataError, match="it was changed after it was opened"):
        train.image(5)


def test_damaged_pages_are_found_by_their_checksums_and_skipped(tmp_path: Path):
    parquet_files(tmp_path, {"train": 6, "test": 4}, checksums=True)
    path = tmp_path / "train-00000-of-00001.parquet"
    data = bytearray(path.read_bytes())
    for found in re.finditer(re.escape(png(4)[100:120]), data):  # in statistics, too
        data[found.start()] ^= 1
    path.write_bytes(data)
    train = open_data(f"parquet:{tmp_path}").split("train")
    assert torch.equal(pixels(train, 0), numbered(0))
    with pytest.raises(tn.DataError, match=r"train-00000-of-00001\.parquet cannot be read: .*CRC"):
        train.image(4)
    source = open_data(f"parquet:{tmp_path}", on_corrupt="skip")
    assert (len(source.split("train")), len(source.skipped)) == (3, 3)  # a row group has three


def test_a_class_must_keep_a_training_image(tmp_path: Path):
    imagenet_folders(tmp_path)
    for path in (tmp_path / "train" / "dog").iterdir():
        path.write_bytes(b"text")
    with pytest.raises(tn.DataError, match=r"no training image of class 'dog' can be decoded; the first: .*dog/0\.png"):
        open_data(f"folder:{tmp_path}", on_corrupt="skip")


def test_headers_are_looked_over_and_the_first_broken_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    imagenet_folders(tmp_path)
    for number in (1, 3):
        (tmp_path / "train" / "dog" / f"{number}.png").write_bytes(b"text")
    source = open_data(f"folder:{tmp_path}")
    source.split("val").look_over()
    with pytest.raises(tn.DataError, match=r"2 images cannot be read, the first: .*dog/1\.png"):
        source.split("train").look_over()
    Subset(source.split("train"), torch.tensor([0, 5])).look_over()
    monkeypatch.setattr(decode, "CHECKED_HEADERS", 5)
    monkeypatch.setattr(decode, "SAMPLED", 3)  # 0, 3 and 6 of 10
    with pytest.raises(tn.DataError, match=r"^[^,]*dog/1\.png"):
        open_data(f"folder:{tmp_path}").split("train").look_over()


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([0, -1], ("a", "b"), "the label -1"),
        ([0, 2], ("a", "b"), "the label 2; with 2 classes"),
        ([0.5, 1.0], ("a", "b"), "are torch.float32"),
        ([], ("a", "b"), "it has no images"),
        ([0, 1], ("a", "a"), "two classes named 'a'"),
        ([0, 1], ("a", 2), "named 2, which is not text"),
    ],
)
def test_data_of_ones_own_are_checked(labels: list[Any], classes: Any, message: str):
    images = arrays(len(labels))
    images.labels = torch.tensor(labels) if labels else torch.zeros(0, dtype=torch.int64)
    with pytest.raises(tn.DataError, match=message):
        DataSource("mine", classes, {"train": images}, (0.5,) * 3, (0.5,) * 3)


def test_arrays_and_torch_data_sets_are_checked():
    good = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    for images, labels in (
        (good[0].float(), good[1]),
        (good[0][0], good[1]),
        (good[0][:, :2], good[1]),
        (good[0], good[1].float()),
        (good[0], good[1][:1]),
        (good[0].numpy(), good[1]),
    ):
        with pytest.raises(tn.ConfigError, match="expected"):
            ArrayImages(images, labels)  # type: ignore[arg-type]
    for labels in ([0.5, 1.5], ["a", "b"], [[0], [1]]):
        with pytest.raises(tn.ConfigError, match="are not integers, one per image"):
            TorchImages([0, 1], labels=labels)  # type: ignore[arg-type]
    with pytest.raises(tn.DataError, match=r"image 5 of list cannot be read: IndexError"):
        TorchImages([0, 1], labels=[0, 1]).image(5)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the project's shared material beside the checkout")
def test_the_shared_sets():
    cifar = open_data(f"parquet:{SHARED / 'cifar10-jpeg'}")
    assert (len(cifar.splits["train"]), len(cifar.splits["test"]), cifar.classes[3]) == (50000, 10000, "cat")
    assert cifar.splits["test"].image(9999).size == (32, 32)
    flowers = open_data(f"folder:{SHARED / 'flowers12'}")
    assert (len(flowers.splits["train"]), len(flowers.splits["val"]), len(flowers.classes)) == (720, 240, 12)
    assert flowers.input_size == (3, 224, 224)
