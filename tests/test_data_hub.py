"""Data sets of the Hub, from a Hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import hub_stub
import thriftnet as tn
from images import parquet_files, picture
from thriftnet.data.hub import CONVERTED
from thriftnet.data.sources import open_data


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_stub.Hub]:
    with hub_stub.running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        template = running.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between attempts
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield running


def files(root: Path, counts: dict[str, int]) -> hub_stub.Files:
    return {path.name: path.read_bytes() for path in parquet_files(root, counts, ["cat", "dog"]).iterdir()}


def below(folder: str, content: hub_stub.Files) -> hub_stub.Files:
    return {f"{folder}/{name}": data for name, data in content.items()}


@pytest.mark.parametrize("folder", ["data", "plain_text"])
def test_parquet_files_are_downloaded_and_code_is_not(hub: hub_stub.Hub, tmp_path: Path, folder: str):
    content = below(folder, files(tmp_path / "made", {"train": 4, "test": 3}))
    hub.repos["someone/pets"] = {"main": {**content, "pets.py": b"raise SystemExit", "README.md": b"# Pets"}}
    source = open_data("hf:someone/pets")
    assert source.spec == "hf:someone/pets"
    assert source.classes == ("cat", "dog")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 4, "test": 3}
    assert source.split("test").image(2).tobytes() == picture(2).tobytes()
    assert {path.suffix for path in (tmp_path / "cache").rglob("*.*") if path.is_file()} >= {".parquet"}
    assert not list((tmp_path / "cache").rglob("pets.py"))


def test_what_was_downloaded_is_there_without_the_hub(hub: hub_stub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.repos["someone/pets"] = {"main": files(tmp_path / "made", {"train": 4, "test": 3})}
    online = open_data("hf:someone/pets").split("train").resident()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert torch.equal(open_data("hf:someone/pets").split("train").resident(), online)
    with pytest.raises(tn.DataError, match="hf:someone/other cannot be read: the Hub cannot be reached"):
        open_data("hf:someone/other")
    assert len(hub.requests) == asked


def test_configurations_and_revisions(hub: hub_stub.Hub, tmp_path: Path):
    small, large = (files(tmp_path / str(count), {"train": count}) for count in (4, 6))
    hub.repos["someone/pets"] = {"main": {**below("small", small), **below("large", large)}, "v1": small}
    assert len(open_data("hf:someone/pets:large").split("train")) == 6
    assert len(open_data("hf:someone/pets@v1").split("train")) == 4
    with pytest.raises(tn.ConfigError, match=r"'default'.*Possible: large, small\. Write hf:someone/pets:CONFIG"):
        open_data("hf:someone/pets")
    with pytest.raises(tn.ConfigError, match="did you mean 'large'"):
        open_data("hf:someone/pets:larg")
    with pytest.raises(tn.DataError, match="hf:someone/pets@v2 cannot be read: no revision 'v2'"):
        open_data("hf:someone/pets@v2")


def test_other_formats_are_read_as_the_hub_converted_them(
    hub: hub_stub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = files(tmp_path / "made", {"train": 4})["train-00000-of-00001.parquet"]
    hub.repos["someone/zipped"] = {"main": {"images.zip": b"PK"}}
    with pytest.raises(tn.DataError, match="has no parquet files named after a split"):
        open_data("hf:someone/zipped")
    hub.repos["someone/zipped"][CONVERTED] = {"default/train/0000.parquet": made, "default/train/0001.parquet": made}
    assert len(open_data("hf:someone/zipped").split("train")) == 8
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(open_data("hf:someone/zipped").split("train")) == 8


def test_a_missing_file_of_a_table_is_noticed(hub: hub_stub.Hub, tmp_path: Path):
    made = files(tmp_path / "made", {"train": 4})["train-00000-of-00001.parquet"]
    hub.repos["someone/pets"] = {"main": {f"train-0000{i}-of-00003.parquet": made for i in (0, 2)}}
    with pytest.raises(tn.DataError, match="has 2 of the 3 files"):
        open_data("hf:someone/pets")


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((401, "RepoNotFound"), "no such data set, or it is private"),
        ((403, "GatedRepo"), "is gated: ask for access"),
        ((500, "Internal"), "cannot be read: "),
    ],
)
def test_refusals_are_one_line(hub: hub_stub.Hub, refusal: tuple[int, str], message: str):
    hub.refusal = refusal
    with pytest.raises(tn.DataError, match=message) as caught:
        open_data("hf:someone/pets")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a/b/c", "someone/pets:", "someone/pets@", "some one/pets", "../pets:x:y"])
def test_names_that_are_no_data_set_are_refused(name: str):
    with pytest.raises(tn.ConfigError, match="write hf:OWNER/NAME"):
        open_data(f"hf:{name}")
