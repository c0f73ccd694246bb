"""Folders that are replaced whole: whenever a process dies, the place holds the old folder or the new one.

A new folder is written in a workspace beside its place (``.thriftnet-XXXX/new``), synced, and exchanged with the old one in
a single step of the file system. Where that has no such step, two renames do it, and `recover` undoes a kill between them.
A workspace is locked while its process lives; the next writer removes those of dead ones.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from thriftnet.errors import CheckpointError

PREFIX = ".thriftnet-"  # of workspaces
LOCK, NEW, OLD = "lock", "new", "old"
TRIES = 10
NO_SUCH_STEP = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}


def replace_folder(place: str | os.PathLike[str], write: Callable[[Path], None]) -> Path:
    """Put a new folder where an old one is, or nothing.

    Of several processes that do this at once, the last one's folder stays. What is open in the old folder stays readable.

    Args:
        place: Where the folder is to be. A link to a folder stays a link.
        write: Fills an empty folder that it is given. What it raises goes through, with the old folder as it was.

    Returns:
        ``place``.

    Raises:
        CheckpointError: The disk is full, the place read-only, the name too long, ...; the old folder is as it was.
    """
    target = Path(os.path.realpath(place))
    workspace = lock = None
    written = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        workspace, lock = _new_workspace(target)
        new = workspace / NEW
        new.mkdir()
        write(new)
        _sync_tree(new)
        _swap(workspace, target)
        written = True
        _sync(target.parent)
    except OSError as error:
        reason = error.strerror or error
        if written:
            raise CheckpointError(f"{place} is written, but the disk does not confirm it: {reason}") from error
        raise CheckpointError(f"cannot write {place}: {reason}. What was there before is unchanged") from error
    finally:
        if workspace is not None and not _holds_the_only_copy(workspace, target):
            _remove(workspace)
        if lock is not None:
            os.close(lock)
    return Path(place)


def recover(place: str | os.PathLike[str]) -> bool:
    """Bring back a folder that a kill between two renames left in a workspace.

    Returns:
        Whether it is worth looking at ``place`` again: it was brought back, or a living process is about to fill it.
    """
    target = Path(os.path.realpath(place))
    for workspace in _workspaces(target.parent):
        if (workspace / OLD).is_dir() and _target(workspace) == target.name:
            lock = _locked(workspace)
            if lock is None:
                return True
            try:
                return _bring_back(workspace, target)
            finally:
                os.close(lock)
    return False


def _new_workspace(target: Path) -> tuple[Path, int]:
    """An empty folder beside ``target``, and the open file that locks it."""
    for _ in range(TRIES):
        workspace = Path(tempfile.mkdtemp(prefix=PREFIX, dir=target.parent))
        try:
            lock = os.open(workspace / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileNotFoundError:
            continue  # another writer took it for a dead one's before it was locked
        except OSError:
            workspace.rmdir()
            raise
        try:
            _flock(lock)
            os.write(lock, target.name.encode())
            if (workspace / LOCK).exists():
                return workspace, lock
        except BlockingIOError:
            pass  # another writer has just locked it, to remove it
        except OSError:
            shutil.rmtree(workspace, ignore_errors=True)
            os.close(lock)
            raise
        os.close(lock)
    raise OSError(errno.EAGAIN, f"{TRIES} workspaces in {target.parent} were removed by others")


def _flock(lock: int) -> bool:
    """Lock an open file; False where the file system has no locks, so that whoever is dead cannot be known."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in NO_SUCH_STEP | {errno.ENOLCK}:
            return False
        raise
    return True


def _locked(workspace: Path) -> int | None:
    """The lock of a workspace, taken over from a dead process; None while its process lives, or where nobody can know."""
    try:
        lock = os.open(workspace / LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        if _flock(lock):
            return lock
    except OSError:
        pass  # held by a living process
    os.close(lock)
    return None


def _workspaces(parent: Path) -> list[Path]:
    try:
        return [path for path in parent.iterdir() if path.name.startswith(PREFIX) and path.is_dir()]
    except OSError:
        return []


def _target(workspace: Path) -> str:
    """Name of the folder that the workspace is for."""
    try:
        return os.fsdecode((workspace / LOCK).read_bytes())
    except OSError:
        return ""


def _sweep(parent: Path) -> None:
    """Remove the workspaces of dead processes, and bring back what they alone hold."""
    for workspace in _workspaces(parent):
        lock = _locked(workspace)
        if lock is None:
            with suppress(OSError):
                workspace.rmdir()  # only if empty: its process died before it could lock it
            continue
        try:
            target = parent / _target(workspace)
            if target.name and _holds_the_only_copy(workspace, target):
                _bring_back(workspace, target)
            else:
                _remove(workspace)
        finally:
            os.close(lock)


def _holds_the_only_copy(workspace: Path, target: Path) -> bool:
    return (workspace / OLD).is_dir() and not target.exists()


def _bring_back(workspace: Path, target: Path) -> bool:
    try:
        _rename_new(workspace / OLD, target)
    except OSError:
        return target.exists()
    _remove(workspace)
    return True


def _remove(workspace: Path) -> None:
    """Remove a workspace, its lock last: what a kill leaves is found by the next writer."""
    for name in (NEW, OLD):
        shutil.rmtree(workspace / name, ignore_errors=True)
    if not (workspace / NEW).exists() and not (workspace / OLD).exists():
        shutil.rmtree(workspace, ignore_errors=True)


def _swap(workspace: Path, target: Path) -> None:
    """Move the new folder to its place; an old one ends in the workspace."""
    new = workspace / NEW
    for _ in range(TRIES):
        try:
            if target.exists():
                _exchange(new, target)
            else:
                _rename_new(new, target)
        except (FileNotFoundError, FileExistsError):
            continue  # another process came or went in between
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                continue  # the same, as told by renames without flags
            if error.errno not in NO_SUCH_STEP:
                raise
            _swap_by_two_renames(workspace, target)
        return
    raise OSError(errno.EBUSY, f"{target} comes and goes: other processes write there")


def _swap_by_two_renames(workspace: Path, target: Path) -> None:
    new, old = workspace / NEW, workspace / OLD
    for _ in range(TRIES):
        with suppress(FileNotFoundError):
            target.rename(old)
        try:
            new.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                if old.exists():
                    old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)  # another process was quicker: its folder is the old one now
            continue
        return
    raise OSError(errno.EBUSY, f"{target} comes and goes: other processes write there")


def _exchange(one: Path, other: Path) -> None:
    """Let two existing paths change places, in one step."""
    _rename(one, other, {"linux": 2, "darwin": 2})  # RENAME_EXCHANGE, RENAME_SWAP


def _rename_new(source: Path, target: Path) -> None:
    """Rename, unless there is something at ``target``."""
    try:
        _rename(source, target, {"linux": 1, "darwin": 4})  # RENAME_NOREPLACE, RENAME_EXCL
    except OSError as error:
        if error.errno not in NO_SUCH_STEP:
            raise
        source.rename(target)  # refuses folders that are not empty by itself


def _rename(source: Path, target: Path, flags: dict[str, int]) -> None:
    """The C library's rename with flags.

    Raises:
        OSError: ENOSYS where there is none; else what the system says.
    """
    flag = flags.get(sys.platform)
    library: Any = None if flag is None else ctypes.CDLL(None, use_errno=True)
    here = -100  # AT_FDCWD
    paths = (os.fsencode(source), os.fsencode(target))
    if hasattr(library, "renameat2"):
        failed = library.renameat2(here, paths[0], here, paths[1], ctypes.c_uint(flag or 0))
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(*paths, ctypes.c_uint(flag or 0))
    else:
        raise OSError(errno.ENOSYS, "the C library cannot rename with flags")
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(source), None, str(target))


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Have the disk hold what the file or folder holds."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir() and os.name == "nt":
            return  # Windows opens no folders
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_SUCH_STEP):
            raise
    finally:
        os.close(handle)
