"""Figure 4: files and folders that were made to run something, watched by an audit hook.

``python -m faults.hostile FOLDER`` is the process that is watched: it opens everything in the folder in each way there is, after
sound files, so that whatever Python loads on first use is there.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults import ROOT
from faults.figure import Figure, Length
from thriftnet.importing import inert, torchfile

CANARY, SECRET = "canary", "root:"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
HARMLESS = {"builtins.id", "sys._getframe", "object.__getattr__"}  # looking at what is there
LISTING = {"os.listdir", "os.scandir"}
LONGEST = 120  # seconds for one of them, which take milliseconds
MEMORY = 4 << 30  # address space for all of them together, so that an endless file cannot harm the machine


def measure(folder: Path, seed: int, length: Length) -> Figure:
    from faults.traps import write_traps

    figure = Figure(
        "Hostile files and folders",
        ["made to harm", "opened with", "cases", "refused", "opened as data", "with side effects"],
    )
    quick = length is Length.QUICK
    write_traps(folder, quick)
    done = subprocess.run([sys.executable, "-m", "faults.hostile", str(folder)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        figure.failures.append(f"the watched process ended with {done.returncode}: {done.stderr[-400:]}")
        return figure
    counts: dict[tuple[str, str], list[int]] = {}
    for case in json.loads(done.stdout.splitlines()[-1]):
        row = counts.setdefault((case["kind"], case["way"]), [0, 0, 0, 0])
        for index, true in enumerate((True, case["refused"], not case["refused"], bool(case["seen"]))):
            row[index] += true
        figure.expect(not case["seen"], f"{case['case']} opened with {case['way']}: {case['seen'][:5]}")
        figure.expect(not case["error"], f"{case['case']} opened with {case['way']}: {case['error']}")
    figure.rows = [[kind, way, *row] for (kind, way), row in counts.items()]
    if not quick:
        _in_torch(folder, figure)
    return figure


def _in_torch(folder: Path, figure: Figure) -> None:
    """See that the pickles work where pickles are run, else they prove nothing."""
    command = [sys.executable, "-m", "faults.hostile", str(folder), "in torch"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    fired = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else []
    figure.expect(bool(fired) and all(fired), f"{fired.count(False)} of the pickles do not work in torch.load either")
    figure.notes.append(
        f"{fired.count(True)} of {len(fired)} hostile pickles do run their code in `torch.load(..., weights_only=False)`, "
        "under the same watch."
    )


class TooLong(BaseException):  # no error that anybody should handle
    """Something takes longer than it may."""


def too_long(*_: object) -> None:
    raise TooLong(f"no answer after {LONGEST} s")


class Watch:
    """Python's audit events, kept while something is watched."""

    def __init__(self) -> None:
        self.watching = False
        self.allowed = ""
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.watching or event in HARMLESS:
            return
        if event in ("open", *LISTING):
            path = os.path.abspath(os.fsdecode(args[0])) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
            writes = event == "open" and (args[2] & WRITING or any(letter in (args[1] or "") for letter in "wax+"))
            listed = event in LISTING and (path == os.path.dirname(self.allowed) or path in sys.path)
            if not writes and (listed or path == self.allowed or path.startswith(self.allowed + os.sep)):
                return
        if event == "subprocess.Popen" and args[1] == torchfile.COMMAND:
            return  # our own reader, which stops and reports whatever it is made to try
        if event == "open" and (args[0] == os.devnull or isinstance(args[0], int)):
            return  # its standard streams
        self.seen.append(f"{event} {args}"[:200])

    @contextlib.contextmanager
    def over(self, path: Path) -> Iterator[list[str]]:
        """Watch what is done inside; to read this path is allowed, and to see what is beside it or could be imported."""
        self.allowed = os.path.abspath(path)
        self.seen = []
        self.watching = True
        try:
            yield self.seen
        finally:
            self.watching = False


def ways(kind: str) -> dict[str, Callable[[Path], object]]:
    """Every way to open such a thing."""
    import thriftnet as tn
    from thriftnet.cli import main
    from thriftnet.errors import CheckpointError
    from thriftnet.resolve import open_model
    from thriftnet.store.model_file import read_config

    def command(*arguments: str) -> None:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main(list(arguments))
        if code:
            raise CheckpointError(said.getvalue())

    if "folder" in kind:
        return {
            "load": tn.load,
            "open_model": lambda path: open_model(str(path)),
            "read_config": read_config,
            "thriftnet count": lambda path: command("count", str(path)),
        }

    def describe(path: Path) -> None:
        with path.open("rb") as file:
            if inert.describe(file).startswith('{"error"'):
                raise CheckpointError("refused")

    alone = {} if kind == "safetensors" else {"the reader alone, unprotected": describe}
    return {
        **alone,
        "import_checkpoint": tn.import_checkpoint,
        "open_model": lambda path: open_model(str(path)),
        "thriftnet import": lambda path: command("import", str(path), "--json"),
    }


def watched(folder: Path) -> list[dict[str, Any]]:
    """Open everything in the folder."""
    from faults.traps import LIBRARIES
    from thriftnet.errors import CheckpointError

    if any(path.name.startswith(LIBRARIES) for path in folder.glob("*/*")):  # what they load on first use is there then
        import timm
        import torchvision.models

        timm.list_models()
        torchvision.models.list_models()
    for module in [module for name, module in sys.modules.items() if name.startswith("thriftnet.")]:
        for value in list(vars(module).values()):
            if callable(resolve := getattr(value, "checks_arguments", None)):
                resolve()  # a function evaluates its own annotations once
    watch, found = Watch(), []
    for kind in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        for way, use in ways(kind).items():
            for path in sorted((folder / kind).iterdir()):  # sound ones first
                refused, error = False, ""
                signal.alarm(LONGEST)
                with watch.over(path) as seen:
                    try:
                        use(path)
                    except CheckpointError as reason:
                        refused = True
                        seen += [str(reason)] if "made its reader try" in str(reason) else []
                        error = "it tells what is in another file" if SECRET in str(reason) else ""
                    except (Exception, SystemExit, TooLong) as other:
                        error = f"{type(other).__name__}: {other}"[:300]
                signal.alarm(0)
                if (folder / CANARY).exists():
                    seen.append("the canary is there")
                    (folder / CANARY).unlink()
                if not path.name.startswith("0 sound"):
                    facts = {"kind": kind, "way": way, "case": path.name, "refused": refused, "seen": seen, "error": error}
                    found.append(facts)
    return found


def in_torch(folder: Path) -> list[bool]:
    """Whether each hostile pickle fires where pickles are run."""
    import torch

    fired, watch = [], Watch()
    for path in sorted((folder / "pickles").iterdir()):
        if not path.name.startswith("0 sound"):
            with watch.over(path), contextlib.suppress(Exception):
                torch.load(path, map_location="cpu", weights_only=False)
            fired.append((folder / CANARY).exists() and bool(watch.seen))
            (folder / CANARY).unlink(missing_ok=True)
    return fired


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, too_long)
    place = Path(sys.argv[1])
    print(json.dumps(in_torch(place) if sys.argv[2:] else watched(place)))
