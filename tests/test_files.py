"""Files are replaced whole: by kills, by several writers at once, before readers, and on disks that refuse."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from thriftnet import files
from thriftnet.files import TEMPORARY, locked, open_regular, sha256_of, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_made_and_replaced(tmp_path: Path):
    path = tmp_path / "deep" / "file"
    for content in ("text ä", b"bytes", lambda file: file.write(b"written")):
        assert write_atomically(path, content) == path
        assert names(path.parent) == ["file"]
    assert path.read_bytes() == b"written"
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode, "others may not read what they may read of usual files"


def test_who_reads_keeps_the_old_file(tmp_path: Path):
    path = write_atomically(tmp_path / "file", "old")
    with open_regular(path) as file:
        write_atomically(path, "new")
        assert file.read() == b"old"
    assert path.read_text() == "new"


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path):
    (tmp_path / "other").write_text("other")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "other")
    write_atomically(link, "new")
    assert (link.read_text(), link.is_symlink()) == ("new", False)
    assert (tmp_path / "other").read_text() == "other"


def test_a_failing_writer_changes_nothing(tmp_path: Path):
    path = write_atomically(tmp_path / "file", "old")

    def fail(file: object) -> None:
        raise KeyError("in the caller's code")

    with pytest.raises(KeyError, match="caller"):
        write_atomically(path, fail)
    assert (path.read_text(), names(tmp_path)) == ("old", ["file"])


def test_a_disk_that_does_not_confirm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_atomically(tmp_path / "file", "old")

    def refuse(place: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "sync", refuse)
    with pytest.raises(OSError, match=r"written, but the disk does not confirm it \(Input/output error\)"):
        write_atomically(path, "new")
    assert path.read_text() == "new"


def test_temporary_files_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path: Path):
    (tmp_path / f"{TEMPORARY}dead").write_text("half")
    seen: list[list[str]] = []

    def nested(file: object) -> None:
        write_atomically(tmp_path / "inner", "inner")
        seen.append([name for name in names(tmp_path) if name.startswith(TEMPORARY)])

    write_atomically(tmp_path / "outer", nested)
    assert len(seen[0]) == 1, "of the dead one's and the living one's file, one must be there"
    assert names(tmp_path) == ["inner", "outer"]


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "_lock", lambda handle: None)
    (tmp_path / f"{TEMPORARY}whose").touch()
    write_atomically(tmp_path / "file", "new")
    assert names(tmp_path) == [f"{TEMPORARY}whose", "file"]


def test_a_temporary_file_removed_before_its_lock_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lock, first = files._lock, []

    def late(handle: int) -> bool | None:
        if not first:
            first.append(handle)
            for path in tmp_path.glob(f"{TEMPORARY}*"):
                path.unlink()  # another process took it for a dead one's
        return lock(handle)

    monkeypatch.setattr(files, "_lock", late)
    assert write_atomically(tmp_path / "file", "new").read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_pipes_and_folders_are_no_files(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("pipe", "device or pipe"), (".", "directory"), ("missing", "No such file")):
        with pytest.raises(OSError, match=reason), open_regular(tmp_path / name):
            pass


def test_the_hash_of_a_file(tmp_path: Path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_one_process_holds_a_lock_until_it_ends(tmp_path: Path):
    path = tmp_path / "run" / ".lock"
    script = "import sys; from thriftnet.files import locked\nwith locked(sys.argv[1]): print('held', flush=True); input()"
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"process {holder.pid}"), locked(path):
            pass
        holder.kill()
    with locked(path):
        assert path.read_text() == str(os.getpid())


@pytest.mark.parametrize("work", [lambda place: None, lambda place: (place / "x").write_text("kept")])
def test_a_lock_that_was_for_nothing_is_removed_with_its_folders(work: Callable[[Path], object], tmp_path: Path):
    place = tmp_path / "a" / "b"
    with suppress(KeyError), locked(place / ".lock"):
        work(place)
        raise KeyError
    assert sorted(path.name for path in tmp_path.rglob("*")) in ([], [".lock", "a", "b", "x"])
    assert (place / "x").exists() == (tmp_path / "a").exists()


def test_a_device_is_not_replaced_and_folders_for_nothing_are_removed(tmp_path: Path):
    (tmp_path / "null").symlink_to(os.devnull)
    with pytest.raises(OSError, match="is a folder, device or pipe"):
        write_atomically(tmp_path / "null", "x")
    assert (tmp_path / "null").is_symlink()

    def fail(file: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a" / "b" / "file", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["null"]


def test_lone_surrogates_are_written_as_escapes(tmp_path: Path):
    assert write_atomically(tmp_path / "file", "a\udcff").read_text() == "a\\udcff"
