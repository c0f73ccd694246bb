"""Command lines made at random of every verb's options: each is done, or refused in one line, and leaves nothing behind."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from argparse import Action
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch

import thriftnet as tn
from faults.figure import Figure, Length, address_space, ended
from images import class_folders, parquet_files
from thriftnet.cli import MODULES, VERBS, main
from thriftnet.cli.common import Parser
from thriftnet.files import TEMPORARY

LONGEST = 10  # seconds of processor time until a command line answers, or does what it was asked to do
STUCK = 90  # seconds of any time
GLIMPSE = 0.5  # seconds between looks at what a process does
MEMORY, FILE = 4 << 30, 256 << 20  # most bytes of address space that a command line may add, and of a file
CAPABILITIES = 0x20080522  # the version of Linux's sets of them
AT_WORK, HANGS = 98, 99  # exit codes of processes that are ended here
OUTCOMES = {0: "done", AT_WORK: "at work", 1: "stopped by the system", 2: "refused", 130: "interrupted"}
INTERRUPTED = 0.1  # share of the command lines that are interrupted, within
SOON = 0.3  # seconds
WORK = ("thriftnet.train.loop", "thriftnet.measure.latency", "thriftnet.dynamic.search", "thriftnet.train.evaluate")
WORK += (
    "thriftnet.core.recalibrate",
    "thriftnet.core.fit",
    "thriftnet.train.compress",
    "thriftnet.cli.bench",
    "torch._dynamo",
    "torch._inductor",
)
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def words(text: str) -> list[str]:
    return text.split()


# fmt: off
NUMBERS = ["-1", "0", "1", "2", "1.5", "-0.0", "nan", "inf", "-inf", "1e308", "1e-308", str(2**31), str(2**63), "9" * 5000]
NUMBERS += ["0x10", "1_0", "\u0663", "1,2", "0.5,0.5,0.5", "1K", "1e999G", "0,0,0", "3,8,8", "1,,2", "-1,-1", ","]
TEXTS = ["", " ", "true", "none", "None", "x" * 5000, "-", "--", "=", "a=b", "$x$", "\x1b[2J\x07", "a\nb", "\t", "\udcff\udc80"]
TEXTS += ["\u202eabc", "é日本", "[" * 3000, "(" * 3000, "{}", "[1, 2", "a: b: c", "&a [*a]", "!!python/object:os.system x"]
TEXTS += ["%s%n", "{0}", "..", "a\0b", "'", '"', "\\", "*", "[!", "lambda: 0", "__import__('os')", "1" * 300 + ".svg"]
PATHS = words("pipe pipe.svg device full missing missing/deep loop loop/x small half run badrun broken foreign file file/x")
PATHS += words("file.svg folder.svg secret locked locked/x ~nouser/x ~ . empty x.svg new new/a/b recipe.yaml bad.yaml")
PATHS += words("bomb.yaml net.pth plan.json bad.json deep.json small/model.safetensors missing.svg/x.svg")
PATHS += ["x" * 300, "\x1b[31mred", "n\nl", "b\udcff"]
REGEXES = ["(a+)+$", "(.*)*(.*)*(.*)*!", r"^(.?){40}(\w)\2{3}(.?){40}$", ".*.*.*.*.*.*.*.*.*.*.*.*.*.*!", "(", "[", "(?P<"]
REGEXES += ["a{99999999999}", "(?<=a*)b", "x{0,4294967295}", "layer", "^$", "(?i)", "\\", "(" * 500 + ")" * 500]
TECHNIQUES = ["shift", "shift(kernel_size=3)", "soft-sharing(templates=2)", "weight-sharing(rate=2, mapping='strided')"]
TECHNIQUES += ["filter-basis(shared_rank=2)", "slimmable(widths=(0.5, 1.0))"]
MODELS = ["small", "slim", "run", "net.pth", "resnet20", "convmixer", "timm:resnet10t", "torchvision:resnet18", "torch.nn:Identity"]
MODELS += ["small/model.safetensors", "hf-hub:nobody/nothing", "timm:nothing", "torchvision:", "os:getcwd", ":", "a:b:c"]
DATA = ["folder:images", "digits", "parquet:tables", "folder:", "folder:odd", "cifar10:images", "hf:", "hf:no/thing", "digits:x"]
DATA += [f"{kind}:{path}" for kind in ("folder", "parquet", "cifar10") for path in PATHS]
SWEEPS = ["num_classes=2,3", "num_classes=" + "9" * 400, "depth=1,x,None", "num_classes=-1,0", "=", "a=", f"num_classes={'[' * 200}"]
KWARGS = words("num-classes in-chans depth dim reduction weight-decay augmentation.flip stages model-kwargs.depth num_clases")
KWARGS += ["mapping", "strides", "system", "x" * 3000, "\x1b[2J", "optimizer", "about", "", ".", "a.b.c", "model", "1"]
# values that suit options, by their names
SUITABLE = {
    ("technique",): TECHNIQUES,
    ("select", "pattern", "paper"): REGEXES,
    ("model", "against", "plain", "teacher", "file"): MODELS + PATHS,
    ("data",): DATA,
    ("output", "plot", "svg", "confusion_plot", "sweep_budget", "plan", "resume", "recipe"): PATHS,
    ("sweep",): SWEEPS,
    ("mode",): ["all", "dynamic", "width", "width=0.5", "width=", "all=1", "x"],
    ("split",): ["train", "test", "val", "../x"],
}
# fmt: on

# what each verb does in a moment
SOUND: dict[str, list[str]] = {
    "demo": ["--output", "new", "--epochs", "1"],
    "models": ["resnet*"],
    "count": ["small"],
    "plan": ["small", "--technique", "shift"],
    "suggest": ["small", "--params", "0.8", "--technique", "soft-sharing"],
    "convert": ["small", "--technique", "shift", "--output", "new"],
    "compress": [
        "small",
        "--data",
        "folder:images",
        "--technique",
        "shift",
        "--epochs",
        "1",
        "--rates",
        "0.01",
        "--output",
        "new",
    ],
    "train": ["--model", "small", "--data", "folder:images", "--output", "new", "--max-steps", "1", "--device", "cpu"],
    "evaluate": ["small", "--data", "folder:images"],
    "recipes": ["digits"],
    "import": ["net.pth", "--model", "resnet20"],
    "bench": ["small", "--rounds", "1"],
    "recalibrate": ["slim", "--data", "folder:images", "--output", "new"],
    "search": [
        "slim",
        "--data",
        "folder:images",
        "--macs",
        "1G",
        "--output",
        "new",
        "--population",
        "2",
        "--generations",
        "1",
    ],
    "similarity": ["soft"],
    "fold": ["soft", "--output", "new"],
}


@dataclass(frozen=True)
class Outcome:
    """How a command line ended: exit code, what it printed, and what its folder holds that was not there."""

    code: int
    out: str
    err: str
    left: list[str]


def measure(folder: Path, seed: int, length: Length) -> Figure:
    columns = ["verb", "command lines", *OUTCOMES.values(), "FAILED"]
    figure = Figure("Generated command lines", columns)
    place = Place(folder)
    chance = random.Random(seed)
    known = parsers()
    with warmed_up(place):
        lines = [made_line(chance, known, verb) for verb in VERBS for _ in range(length.pick(1, 42, 142))]
        lines += [[verb, *SOUND[verb]] for verb in VERBS]
        counts = {verb: dict.fromkeys(OUTCOMES, 0) for verb in VERBS}
        failed = dict.fromkeys(VERBS, 0)
        for line in lines:
            outcome = place.run(line, SOON * chance.random() if chance.random() < INTERRUPTED else 0)
            wrong = problem(outcome, as_json="--json" in line)
            figure.expect(not wrong, f"{wrong}: thriftnet {line!a}")
            failed[line[0]] += bool(wrong)
            counts[line[0]][outcome.code] = counts[line[0]].get(outcome.code, 0) + (not wrong)
    for verb in VERBS:
        figure.rows.append(
            [verb, sum(counts[verb].values()) + failed[verb], *(counts[verb][code] for code in OUTCOMES), failed[verb]]
        )
    closed = _closed_streams(place, ["models", "recipes", "count"][: length.pick(1, 2, 3)])
    for wrong in closed:
        figure.failures.append(wrong)
    figure.notes += [
        f"Failures would be: another exit code, a traceback, no answer after {LONGEST} s, control characters in what is printed, "
        "more than one line in a refusal, anything left behind or changed by one, and JSON that is none.",
        '"At work" were those that had begun to train, measure or search, and were not waited for.',
    ]
    return figure


def parsers() -> dict[str, Parser]:
    """The options of each verb, as it makes them itself."""

    class Seen(BaseException):
        pass

    found: dict[str, Parser] = {}
    for verb in VERBS:

        def see(parser: Parser, *_: object, verb: str = verb) -> None:
            found[verb] = parser
            raise Seen

        with patch.object(Parser, "parse_args", see), suppress(Seen):
            importlib.import_module(f"thriftnet.cli.{MODULES.get(verb, verb)}").run([])
    return found


def made_line(chance: random.Random, known: dict[str, Parser], verb: str) -> list[str]:
    """A command line: a sound one with some options replaced, added, damaged or left out."""
    line = list(SOUND[verb])
    actions = [action for action in known[verb]._actions if "--help" not in action.option_strings]
    for _ in range(chance.choice((1, 1, 2, 3))):
        action = chance.choice(actions)
        kind = chance.random()
        if kind < 0.7:
            _put(chance, line, action)
        elif kind < 0.8:
            line += [f"--{chance.choice(KWARGS)}", _nasty(chance)]
        elif kind < 0.85 and line:
            del line[chance.randrange(len(line))]
        elif kind < 0.9:
            line.insert(chance.randrange(len(line) + 1), _nasty(chance))
        elif kind < 0.95 and line:
            index = chance.randrange(len(line))
            line[index] = _damaged(chance, line[index])
        else:
            line.append(chance.choice(action.option_strings or ["--"]) + chance.choice(("", "=", "=x", "x")))
    if chance.random() < 0.15:
        line.append("--json")
    return [verb, *line]


def _put(chance: random.Random, line: list[str], action: Action) -> None:
    """Give an option, or the verb's argument, another value."""
    flag = [chance.choice(action.option_strings)] if action.option_strings else []
    count = 0 if action.nargs == 0 else chance.choice((1, 1, 2)) if action.nargs == "+" else 1
    values = [_value(chance, action) for _ in range(count)]
    if not flag and line:
        line[0] = values[0]
    elif flag and flag[0] in line and count == 1 and (at := line.index(flag[0])) + 1 < len(line):
        line[at + 1] = values[0]
    elif flag and len(values) == 1 and chance.random() < 0.3:
        line.append(f"{flag[0]}={values[0]}")
    else:
        line += [*flag, *values]


def _value(chance: random.Random, action: Action) -> str:
    """A value that suits an option, damaged or not, or any."""
    if chance.random() < 0.25:
        return _nasty(chance)
    name = action.dest
    if action.choices and chance.random() < 0.5:
        return str(chance.choice(list(action.choices)))
    for names, values in SUITABLE.items():
        if name in names:
            value = chance.choice(values)
            return _damaged(chance, value) if chance.random() < 0.2 else value
    return chance.choice(NUMBERS if chance.random() < 0.5 else NUMBERS[:5])


def _nasty(chance: random.Random) -> str:
    return chance.choice(chance.choice((NUMBERS, TEXTS, PATHS, REGEXES, TECHNIQUES, MODELS)))


def _damaged(chance: random.Random, text: str) -> str:
    """A text in which something is doubled, left out or put in."""
    at, length = chance.randrange(len(text) + 1), chance.randrange(1, 4)
    middle = chance.choice(("", text[at : at + length] * 2, chance.choice("()[]{}=,.'\"\\-*\n\x1b0\u202e\udcff"), "9" * 30))
    return text[:at] + middle + text[at + length :]


class Place:
    """A folder with networks, data and traps, in which command lines run; made again when one has changed it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.logs = folder / "work", folder / "model", folder / "logs"
        self.said = folder / "said"
        self.logs.mkdir()
        self.said.mkdir()
        furnish(self.model)
        self._renew()

    def _renew(self) -> None:
        if self.folder.exists():
            subprocess.run(["chmod", "-R", "u+rwX", str(self.folder)], check=True)
            shutil.rmtree(self.folder)
        subprocess.run(["cp", "-a", str(self.model), str(self.folder)], check=True)
        self.before = contents(self.folder)

    def run(self, line: list[str], interrupt: float = 0) -> Outcome:
        """Run a command line in a copy of this process, interrupted after some seconds, if any."""
        out, err = self.said / "out", self.said / "err"
        child = os.fork()
        if not child:
            self._child(line, interrupt, out, err)
        code = ended(child)
        after = contents(self.folder)
        left = sorted(name for name in {**self.before, **after} if self.before.get(name) != after.get(name))
        if left:
            self._renew()
        said = [path.read_text(encoding="utf-8", errors="surrogateescape") for path in (out, err)]
        logs = list(self.logs.glob("*.log"))
        if code == 70:
            said[1] += "".join(path.read_text()[-900:] for path in logs)
        for path in logs:
            path.unlink()
        return Outcome(code, *said, left)

    def _child(self, line: list[str], interrupt: float, out: Path, err: Path) -> None:
        """Does not return."""
        os.setpgid(0, 0)
        for path, handle in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), handle)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (open(handle, "w", encoding="utf-8", closefd=False) for handle in (1, 2))  # noqa: SIM115
        code = 1
        try:
            os.chdir(self.folder)
            most = address_space() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            drop_privileges()
            faulthandler.dump_traceback_later(STUCK + 10, exit=True)  # what holds the interpreter is no signal's to stop
            watch_over()
            signal.signal(signal.SIGPROF, lambda *_: signal.raise_signal(signal.SIGINT))
            signal.setitimer(signal.ITIMER_PROF, interrupt)
            code = main(line)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 97
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)


def drop_privileges() -> None:
    """Have the modes of files stop the superuser, too."""
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)())


def watch_over() -> None:
    """End this process when it does what it was asked to do, or does not answer."""
    start, spent = time.monotonic(), time.process_time()

    def look(number: int, frame: FrameType | None) -> None:
        stack = []
        while frame is not None:
            stack.append(str(frame.f_globals.get("__name__", "")))
            frame = frame.f_back
        if any(name.startswith(WORK) for name in stack):
            os._exit(AT_WORK)
        if time.process_time() - spent > LONGEST or time.monotonic() - start > STUCK:
            faulthandler.dump_traceback()
            os._exit(HANGS)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, GLIMPSE, GLIMPSE)


def problem(outcome: Outcome, *, as_json: bool) -> str:
    """What should not have happened; "" if nothing."""
    said = outcome.out + outcome.err
    if outcome.code == HANGS or "Timeout (" in said:
        return f"no answer after {LONGEST} s, in {outcome.err[:300]}"
    if outcome.code not in OUTCOMES:
        return f"exit code {outcome.code}, {outcome.err[-1200:]}"
    if "Traceback (most" in said:
        return f"a traceback, {said[-400:]}"
    if found := CONTROL.search(said):
        return f"the character {found[0]!r} is printed in {said[max(0, found.start() - 60) : found.end() + 20]!r}"
    *progress, last = outcome.err.splitlines() or [""]  # what is interrupted may have told of epochs before
    if outcome.code in (1, 2, 130) and (
        outcome.out
        or not last.startswith("thriftnet")
        or not all(outcome.code == 130 and line.startswith("epoch ") for line in progress)
    ):
        return f"{outcome.err.count(chr(10))} lines of refusal, {said[-400:]!r}"
    if outcome.code in (1, 2) and outcome.left:
        return f"exit code {outcome.code}, and {outcome.left[:3]} left or changed ({outcome.err[:200]})"
    if any(TEMPORARY in name for name in outcome.left) and outcome.code != AT_WORK:
        return f"unfinished files: {outcome.left}"
    if outcome.code == 0 and as_json and outcome.out and not outcome.out.startswith("usage"):
        try:
            json.loads(outcome.out.splitlines()[-1], parse_constant=lambda name: json.loads(""))
        except ValueError:
            return f"the last line is no JSON: {outcome.out[-200:]!r}"
    return ""


def contents(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a folder, with what tells whether it changed."""
    found: dict[str, tuple[object, ...]] = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            status = os.lstat(path)
            own = () if name in folders else (status.st_size, status.st_mtime_ns)
            found[os.path.relpath(path, folder)] = (status.st_mode, *own)
    return found


def furnish(place: Path) -> None:
    """Networks, data sets and plans, sound and damaged, and what else may lie at a path."""
    place.mkdir()
    torch.manual_seed(0)
    plain = tn.create_model("resnet20", reduction=4, num_classes=2)
    tn.save(plain, place / "small")
    tn.save(tn.convert(plain, "slimmable(widths=(0.5, 1.0))"), place / "slim")
    tn.save(tn.convert(plain, "soft-sharing(templates=2)"), place / "soft")
    (place / "plan.json").write_text(tn.plan(plain, "shift").to_json())
    torch.save(tn.create_model("resnet20").state_dict(), place / "net.pth")
    class_folders(place / "images", per_class=6)
    class_folders(place / "odd", per_class=6, names=("$x$_^", "\udcff\x1b[2J", "a\nb<i>&", "x" * 200))
    parquet_files(place / "tables", {"train": 8, "test": 4})
    data = bytearray((place / "small" / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    for name, content in {"half": bytes(data[:1000]), "broken": bytes(data)}.items():
        (place / name).mkdir()
        (place / name / "model.safetensors").write_bytes(content)
    for name, text in {"run": '{"recipe": {}, "finished": true}', "badrun": '{"recipe": ["\x1b[2J'}.items():
        shutil.copytree(place / "small", place / name / "model")
        (place / name / "run.json").write_text(text)
    (place / "foreign").mkdir()
    (place / "foreign" / "thesis.txt").write_text("x")
    (place / "empty").mkdir()
    (place / "folder.svg").mkdir()
    for name, text in {
        "file": "x",
        "file.svg": "<svg/>",
        "bad.json": '{"technique": ',
        "deep.json": "[" * 100_000,
        "recipe.yaml": "model: resnet20\nepochs: 1\n",
        "bad.yaml": "model: [\nepochs: \x1b",
        "bomb.yaml": "a: &a [x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join(6 * [f'*{a}'])}]\n" for a, b in pairwise("abcdefghijk")),
    }.items():
        (place / name).write_text(text)
    (place / "secret").write_text("x")
    (place / "locked").mkdir()
    for path in ("pipe", "pipe.svg"):
        os.mkfifo(place / path)
    for path, target in {"loop": "loop", "device": "/dev/zero", "full": "/dev/full"}.items():
        (place / path).symlink_to(target)
    (place / "secret").chmod(0)
    (place / "locked").chmod(0o555)


@contextmanager
def warmed_up(place: Place) -> Iterator[None]:
    """Have loaded here what command lines load, and have all they write beside their folder in one place."""
    home = {
        "HOME": str(place.logs),
        "TMPDIR": str(place.logs),
        "HF_HUB_OFFLINE": "1",
        "MPLCONFIGDIR": str(place.logs),
        "COLUMNS": "100",
    }
    home |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # nothing is downloaded
    import tempfile

    with patch.dict(os.environ, home), patch.object(tempfile, "tempdir", None):
        for name in (
            "timm",
            "torchvision.models",
            "accelerate",
            "matplotlib.backends.backend_svg",
            "rich.progress",
            "pyarrow.parquet",
        ):
            importlib.import_module(name)
        for name in (
            "sklearn.datasets",
            "thriftnet.train.trainer",
            "thriftnet.cli.evaluate_widths",
            "torch.utils.tensorboard",
        ):
            with suppress(ImportError):
                importlib.import_module(name)
        yield


def _closed_streams(place: Place, verbs: list[str]) -> list[str]:
    """Command lines in processes of their own, whose standard streams are closed or full."""
    wrong = []
    ways: dict[str, Callable[[], Any]] = {
        "full": lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1),
        "closed": lambda: os.close(1),
    }
    for verb in verbs:
        for way, prepare in ways.items():
            line = [sys.executable, "-m", "thriftnet", verb, *SOUND[verb]]
            done = subprocess.run(line, preexec_fn=prepare, stderr=subprocess.PIPE, text=True, cwd=place.model, check=False)
            if done.returncode != 1 or done.stderr.count("\n") != 1:
                wrong.append(f"standard output is {way}: exit code {done.returncode}, {done.stderr[-300:]!r}: {verb}")
    return wrong
