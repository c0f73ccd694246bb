"""Models are replaced whole: by kills, by several writers at once, before readers, and on disks that refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import thriftnet as tn
from saver import killed_savers, network, save_alternately, value_in, value_of
from thriftnet.errors import CheckpointError
from training import in_children, limit_files

NAMES = ["README.md", "config.json", "model.safetensors"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_kills_leave_the_old_or_the_new_folder(tmp_path: Path):
    place = tmp_path / "m"
    seen = killed_savers(place, kills=10, seed=0)
    assert len(seen) == 10
    assert set(seen) != {1.0}, "no save came to its end"
    tn.save(network(4.0), place, metadata={"value": 4.0})
    assert value_of(place) == 4.0
    assert names(place) == NAMES, "temporary files of the killed are left"


def test_two_writers_and_a_reader(tmp_path: Path):
    place = tmp_path / "m"
    tn.save(network(1.0), place, metadata={"value": 1.0})
    reads: list[float] = []
    enough = tmp_path / "enough"

    def write(rank: int) -> None:
        while not enough.exists():
            save_alternately(place, (2.0 + 2 * rank, 3.0 + 2 * rank), 2)

    def read() -> None:
        reads.append(value_in(place))
        if (len(reads) >= 40 and len(set(reads)) > 1) or len(reads) == 10_000:
            enough.touch()

    assert in_children(write, 2, together=False, meanwhile=read) == [0, 0]
    assert set(reads) <= {1.0, 2.0, 3.0, 4.0, 5.0}
    assert len(set(reads)) > 1, "the reader saw no change: the test shows nothing"
    assert value_of(place) in (3.0, 5.0)
    assert names(place) == NAMES


@pytest.mark.parametrize("size", [100, 1000, 30_000])
def test_a_full_disk_leaves_the_old_folder(size: int, tmp_path: Path):
    place = tn.save(network(1.0), tmp_path / "m", metadata={"value": 1.0})
    pipe = os.pipe()

    def save(_: int) -> None:
        limit_files(size)
        with pytest.raises(CheckpointError) as caught:
            tn.save(network(2.0), place, metadata={"value": 2.0})
        os.write(pipe[1], f"{caught.value}\n".encode())

    assert in_children(save) == [0]
    said = os.read(pipe[0], 10_000).decode()
    assert said.startswith(f"cannot write {place}: ")
    assert "File too large" in said
    assert said.count("\n") == 1
    assert value_of(place) == 1.0
    assert names(place) == NAMES
    assert json.loads((place / "config.json").read_text())["metadata"] == {"value": 1.0}


def test_a_place_that_cannot_be_written(tmp_path: Path):
    model = network(1.0)
    with pytest.raises(tn.ConfigError, match="names of at most 255 bytes"):
        tn.save(model, tmp_path / ("x" * 300))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"Not a directory|no model folder|File exists"):
        tn.save(model, tmp_path / "file" / "model")
    tn.save(model, tmp_path / ("x" * 255))
    assert {path.name for path in tmp_path.iterdir()} == {"file", "x" * 255}


def test_a_read_only_folder_is_left(tmp_path: Path):
    place = tn.save(network(1.0), tmp_path / "m", metadata={"value": 1.0})
    place.chmod(0o555)
    try:
        if os.access(place, os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(CheckpointError, match="Permission denied"):
            tn.save(network(2.0), place)
        assert value_of(place) == 1.0
        assert names(place) == NAMES
    finally:
        place.chmod(0o755)


def test_others_may_read_what_they_may(tmp_path: Path):
    place = tn.save(network(1.0), tmp_path / "m")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (place, *place.iterdir())}
    plain = tmp_path / "plain"
    plain.write_text("")
    usual = plain.stat().st_mode & 0o777
    assert {modes["config.json"], modes["model.safetensors"], modes["README.md"]} == {usual}
    assert modes["m"] & usual == usual


def test_random_state_is_left_alone(tmp_path: Path):
    folder = tn.save(tn.convert(tn.create_model("resnet20"), "soft-sharing(templates=2)"), tmp_path / "m")
    before = torch.get_rng_state()
    tn.load(folder)
    assert torch.equal(torch.get_rng_state(), before)
