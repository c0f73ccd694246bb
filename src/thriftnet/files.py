"""Files that are replaced in one step, opened without waiting, hashed, and locked: for models, runs, checkpoints and reports."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".thriftnet-"  # how the names of unfinished files begin
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOLCK}
TRIES = 10
MOST_TEXT = 64 << 20  # bytes


Content = bytes | str | Callable[[BinaryIO], object]


def write_atomically(path: str | os.PathLike[str], content: Content) -> Path:
    """Write a file so that whenever the process is killed, the old or the new content is there, whole and synced.

    The content goes to a temporary file beside ``path``, which then takes its place in one step. Whoever has the old file open
    keeps reading it. Temporary files of killed processes are removed by the next call in that folder; they are recognised
    by their lock, so where a file system has no locks (and on Windows) they stay.

    Args:
        path: Where to; its folder is made where it is missing. A link is replaced, not followed.
        content: Bytes, text (UTF-8, with lone surrogates escaped), or a function that writes to the open file it is given.

    Raises:
        OSError: The disk is full, the folder read-only, ...; what was at ``path`` is still there, whole.
    """
    target = Path(path)
    write_together(target.parent, {target.name: content})
    return target


def write_together(folder: str | os.PathLike[str], contents: Mapping[str, Content]) -> None:
    """`write_atomically` several files of a folder: none is replaced, in the order given, before all are on the disk.

    Raises:
        OSError: As `write_atomically`.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        changed = [folder, *(place.parent for place in stack.enter_context(made(folder)))]
        _remove_abandoned(folder)
        for name in contents:
            if os.path.exists(folder / name) and not os.path.isfile(folder / name):
                raise OSError(errno.EINVAL, f"{name} is a folder, device or pipe")
        drafts = [(_drafted(folder, content, stack), folder / name) for name, content in contents.items()]
        for draft, target in drafts:
            os.replace(draft, target)
    try:
        for place in changed:
            sync(place)
    except OSError as error:
        raise OSError(error.errno, f"it is written, but the disk does not confirm it ({error.strerror})") from error


@contextmanager
def made(folder: Path) -> Iterator[list[Path]]:
    """Make a folder and those above it; yields the new ones, of which the empty ones are removed if what follows fails."""
    new = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield new
    except BaseException:
        with suppress(OSError):
            for place in new:
                place.rmdir()
        raise


def _drafted(folder: Path, content: Content, stack: ExitStack) -> Path:
    """A temporary file with the content, on the disk; closing the stack removes it, if it is still there, and its lock."""
    path, lock = _new_temporary(folder)
    if lock is not None:
        stack.callback(os.close, lock)
    stack.callback(_remove, path)
    with open(path, "wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    return path


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def sync(path: str | os.PathLike[str]) -> None:
    """Have the disk hold what a file or folder holds, where folders can be synced (not on Windows)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.name == "nt" and os.path.isdir(path):
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if not (os.path.isdir(path) and error.errno in UNSUPPORTED):
            raise
    finally:
        os.close(handle)


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for reading, and never wait for a pipe in its place.

    Raises:
        OSError: There is no file, or a folder, device or pipe, which may never end.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is a device or pipe, not a file")
        yield file


def read_text(path: str | os.PathLike[str]) -> str:
    """The text (UTF-8) of a file of at most `MOST_TEXT` bytes.

    Raises:
        OSError: As `open_regular`, or it is larger.
        UnicodeDecodeError: It is no text.
    """
    with open_regular(path) as file:
        content = file.read(MOST_TEXT + 1)
    if len(content) > MOST_TEXT:
        raise OSError(errno.EFBIG, f"it has more than {MOST_TEXT >> 20} MiB, too much for text", str(path))
    return content.decode("utf-8")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a lock file; the system releases it when the process ends, however it ends. Without effect on Windows.

    If what is done meanwhile fails before anything else is written to the folder, the file is removed again.

    Raises:
        BlockingIOError: Another process holds it; ``strerror`` is "process NUMBER".
        OSError: The file cannot be written.
    """
    place = Path(path)
    with made(place.parent):
        before = os.listdir(place.parent)
        handle = _locked_file(place)
        try:
            os.ftruncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
            yield
        except BaseException:
            if sorted(os.listdir(place.parent)) == sorted([*before, place.name]):  # nothing was done
                _remove(place)
            raise
        finally:
            os.close(handle)


def _locked_file(path: Path) -> int:
    """The handle of a lock file that is there, and that this process alone holds."""
    for _ in range(TRIES):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o644)
        alone = _lock(handle)
        if alone is None or (alone and os.fstat(handle).st_nlink):
            return handle
        os.close(handle)
        if not alone:
            with open_regular(path) as file:
                owner = file.read(32).decode("ascii", "replace").strip()
            raise BlockingIOError(errno.EWOULDBLOCK, f"process {owner}")
    raise OSError(errno.EAGAIN, "other processes remove the lock")


def _lock(handle: int) -> bool | None:
    """Lock an open file: whether nobody else holds it; None where files cannot be locked."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        raise
    return True


def _new_temporary(folder: Path) -> tuple[Path, int | None]:
    """An empty file, and the handle that locks it while its process lives; None where files cannot be locked."""
    for _ in range(TRIES):
        path = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        alone = _lock(handle)
        if alone and os.fstat(handle).st_nlink:
            return path, handle
        os.close(handle)
        if alone is None:
            return path, None
    raise OSError(errno.EAGAIN, "other processes remove the temporary files")  # each was swept before it was locked


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of processes that were killed."""
    with suppress(OSError):
        for path in list(folder.glob(f"{TEMPORARY}*")):
            with suppress(OSError):
                handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
                try:
                    if _lock(handle):
                        path.unlink()
                finally:
                    os.close(handle)
