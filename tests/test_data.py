"""Data sets as users name them: what they hold, and what is said when they are missing, broken or odd."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import socket
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import thriftnet as tn
from images import arrays, class_folders, parquet_files, picture, png
from thriftnet.data.dataset import DataSource, ImageDataset, Subset, TorchImages
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_pipes_in_place_of_files_are_refused_without_waiting(tmp_path: Path):
    imagenet_folders(tmp_path)
    os.mkfifo(tmp_path / "val" / "cat" / "9.png")
    val = open_data(f"folder:{tmp_path}").split("val")
    with pytest.raises(tn.DataError, match=r"9\.png cannot be decoded: it is a device or pipe"):
        val.image(2)
    os.mkfifo(tmp_path / "train-0.parquet")
    with pytest.raises(tn.DataError, match=r"train-0\.parquet is not a file"):
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
    "png": ("L", "P", "RGBA", "I;16", "1", "LA"),
    "jpg": ("L", "CMYK", "1"),
    "tif": ("L", "P", "RGBA", "CMYK", "I;16", "1", "LA"),
    "gif": ("L", "P", "RGBA", "1", "LA"),
}


@pytest.mark.parametrize(("ending", "mode"), [(ending, mode) for ending, modes in KINDS.items() for mode in modes])
def test_every_kind_of_image_becomes_what_torchvision_makes_of_it(tmp_path: Path, ending: str, mode: str):
    from torchvision.datasets.folder import pil_loader

    path = tmp_path / f"image.{ending}"
    image = picture(1).convert("L").convert("I").convert("I;16") if mode == "I;16" else picture(1).convert(mode)
    image.save(path, **({"compression": "tiff_lzw"} if ending == "tif" else {}))
    got = FolderImages(tmp_path, [path.name], [0]).image(0)
    assert got.mode == "RGB"
    assert got.tobytes() == pil_loader(path).tobytes()


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


def cifar_files(root: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> Path:
    """A few images in the layout of CIFAR, with md5 sums to match."""
    from torchvision import datasets

    ten = kind == "cifar10"
    made = datasets.CIFAR10 if ten else datasets.CIFAR100
    folder = root / made.base_folder
    folder.mkdir()
    names = ["a", "b", "c"]
    sums = {}
    files = [name for name, _ in made.train_list + made.test_list]
    for number, name in enumerate(files):
        data = np.random.default_rng(number).integers(0, 256, (3, 3072), dtype=np.uint8)
        content = {"data": data, "labels" if ten else "fine_labels": [0, 1, 2]}
        (folder / name).write_bytes(pickle.dumps(content))
    key = str(made.meta["key"])
    (folder / made.meta["filename"]).write_bytes(pickle.dumps({key: names}))
    for path in folder.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(made, "train_list", [[name, sums[name]] for name, _ in made.train_list])
    monkeypatch.setattr(made, "test_list", [[name, sums[name]] for name, _ in made.test_list])
    monkeypatch.setattr(made, "meta", {**made.meta, "md5": sums[made.meta["filename"]]})
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, also where there is one."""

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_in_the_layout_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    folder = cifar_files(tmp_path, monkeypatch, kind)
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
    folder = cifar_files(tmp_path, monkeypatch, "cifar10")

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
    with pytest.raises(tn.ConfigError, match="expected 'error' or 'skip'"):
        open_data("digits", on_corrupt="ignore")


def test_missing_and_empty_folders_are_refused(tmp_path: Path):
    for kind in ("folder", "parquet"):
        with pytest.raises(tn.DataError, match="there is no folder"):
            open_data(f"{kind}:{tmp_path / 'nothing'}")
    with pytest.raises(tn.DataError, match="has no class folders"):
        open_data(f"folder:{tmp_path}")
    with pytest.raises(tn.DataError, match="no files named"):
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
    with pytest.raises(tn.DataError, match="no complete parquet tables"):
        open_data(f"parquet:{tmp_path}")


def test_more_labels_than_class_names_are_refused(tmp_path: Path):
    with pytest.raises(tn.DataError, match="labels up to 1 and 1 class names"):
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


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the project's shared material beside the checkout")
def test_the_shared_sets():
    cifar = open_data(f"parquet:{SHARED / 'cifar10-jpeg'}")
    assert (len(cifar.splits["train"]), len(cifar.splits["test"]), cifar.classes[3]) == (50000, 10000, "cat")
    assert cifar.splits["test"].image(9999).size == (32, 32)
    flowers = open_data(f"folder:{SHARED / 'flowers12'}")
    assert (len(flowers.splits["train"]), len(flowers.splits["val"]), len(flowers.classes)) == (720, 240, 12)
    assert flowers.input_size == (3, 224, 224)
