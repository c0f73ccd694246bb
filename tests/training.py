"""What the tests of training share: tiny data, a tiny network, and processes that are killed."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from thriftnet.data.dataset import ArrayImages, DataSource
from thriftnet.train.loop import Progress

PORTS: list[int] = []  # handles that lock those in use


def source(count: int = 96, test: int = 40, size: int = 8, classes: int = 3, channels: int = 3) -> DataSource:
    """Images that a network can learn: each class has its own brightness, with noise."""
    random = torch.Generator().manual_seed(0)

    def images(number: int) -> ArrayImages:
        labels = torch.arange(number) % classes
        base = (labels * (200 // classes) + 20).view(-1, 1, 1, 1)
        noise = torch.randint(0, 40, (number, channels, size, size), generator=random)
        return ArrayImages((base + noise).to(torch.uint8), labels)

    names = tuple(f"class{i}" for i in range(classes))
    splits = {"train": images(count), "test": images(test)}
    return DataSource("tiny", names, dict(splits), (0.5,) * channels, (0.25,) * channels)


class Net(nn.Sequential):
    """Three convolutions (0, 3 and 6) with batch norms (or without), dropout and a classifier."""

    def __init__(self, classes: int = 3, dropout: float = 0.0, norms: bool = True) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6) if norms else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.BatchNorm2d(6) if norms else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.BatchNorm2d(6) if norms else nn.Identity(),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(6, classes),
        )


def in_children(
    work: Callable[[int], None], ranks: int = 1, *, together: bool = True, meanwhile: Callable[[], object] | None = None
) -> list[int]:
    """Run work(rank) in forked processes (much faster than starting Python again); gives their exit codes.

    ``meanwhile`` is called here over and over until all have ended.
    A negative code is the signal that ended one, 0 is done, 1 an exception, which is printed.
    """
    port = free_port()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            code = 1
            try:
                if together and ranks > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
                work(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = {}
    while len(codes) < ranks:
        child, status = os.waitpid(-1, os.WNOHANG if meanwhile else 0)
        if meanwhile and not child:
            meanwhile()
        if child not in children:
            continue
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child]:  # the others would wait for it for ever
            for other in children:
                if other not in codes:
                    os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


def limit_files(size: int) -> None:
    """From here on no file of this process may grow beyond ``size`` bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def free_port() -> int:
    """A port that nobody uses, and that no other test process takes while this one lives.

    The system gives away those of its own range, above 32767, at any time.
    """
    folder = Path(tempfile.gettempdir()) / f"thriftnet-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for port in range(20_000, 32_000):
        handle = os.open(folder / str(port), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as chosen:
                chosen.bind(("127.0.0.1", port))
            PORTS.append(handle)
            return port
        except OSError:
            os.close(handle)
    raise RuntimeError("all ports are in use")


def kill_at(step: int) -> Callable[[Progress], None]:
    """Kill this process, as kill -9 does, after a step."""

    def on_progress(progress: Progress) -> None:
        if progress.step >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_progress


def metrics(run: Path) -> list[dict[str, object]]:
    """A run's metrics without those that measure time."""
    from thriftnet.train.run_folder import read_metrics

    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in read_metrics(run)]
