"""The command line: what it prints, what it refuses, and that help is light."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import thriftnet
from thriftnet.cli import VERBS, main
from thriftnet.cli.common import Parser, parse_with_kwargs
from thriftnet.cli.output import emit, write_text
from thriftnet.core.provenance import data_facts


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a wrong use prints."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("thriftnet")
    assert captured.err.count("\n") == 1
    return captured.err


def test_help_names_every_verb_and_loads_nothing_heavy():
    code = """
import sys
from thriftnet.cli import VERBS, main
main(["--help"])
for verb in VERBS:
    try:
        main([verb, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
main(["models"])
main(["recipes"])
heavy = {"torch", "numpy", "matplotlib", "timm", "torchvision", "sklearn"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"  {verb} " in done.stdout for verb in VERBS)


def test_importing_thriftnet_loads_no_torch():
    code = "import thriftnet, sys; print('torch' in sys.modules, len(thriftnet.__all__) > 20)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_every_public_name_exists():
    assert all(getattr(thriftnet, name) is not None for name in thriftnet.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = thriftnet.nothing


def test_version(capsys: pytest.CaptureFixture[str]):
    assert run(capsys, "--version") == f"thriftnet {thriftnet.__version__}\n"


def test_models_as_table_and_json(capsys: pytest.CaptureFixture[str]):
    assert "resnet110" in run(capsys, "models", "resnet*")
    listed = json.loads(run(capsys, "models", "wrn28_10", "--json"))["models"]
    assert [entry["params"] for entry in listed] == [36479194]


def test_count_takes_model_arguments_technique_and_baseline(capsys: pytest.CaptureFixture[str]):
    plain = json.loads(run(capsys, "count", "resnet20", "--num-classes", "100", "--json"))
    assert plain["params"] == 269722 + 90 * 65
    soft = json.loads(
        run(capsys, "count", "resnet20", "--technique", "soft-sharing(templates=2)", "--against", "resnet20", "--json")
    )
    assert soft["params"] < soft["against"]["params"] == 269722
    assert soft["macs"] == soft["against"]["macs"] == 40551040


def test_count_sweeps_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    picture = tmp_path / "sweep.svg"
    axes = ["--sweep", "shared-rank=4,8", "--sweep", "unique_rank=0,1,2000"]
    command = ["count", "resnet32_double_shared", "--num-classes", "7", *axes]
    found = json.loads(run(capsys, *command, "--plot", str(picture), "--json"))
    assert [tuple(row["arguments"].values()) for row in found["sweep"]] == [(4, 0), (4, 1), (8, 0), (8, 1)]
    for row in found["sweep"]:
        model = thriftnet.create_model("resnet32_double_shared", num_classes=7, **row["arguments"])
        report = thriftnet.inspect(model)
        assert (row["params"], row["macs"]) == (report.params, report.macs)
    assert [row["arguments"]["unique_rank"] for row in found["refused"]] == [2000, 2000]
    assert picture.read_text().startswith("<svg")
    head, *rows = run(capsys, *command).splitlines()
    assert head.split() == ["shared_rank", "unique_rank", "parameters", "MACs"]
    assert len(rows) == 6
    assert rows[-1].startswith("left out: shared_rank=8, unique_rank=2000: ")


def test_count_sweeps_words_and_converts(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    options = ["--technique", "soft-sharing(templates=2)", "--plot", str(tmp_path / "sweep.svg")]
    rows = json.loads(run(capsys, "count", "resnet20", "--sweep", "shortcut=pad,projection", *options, "--json"))["sweep"]
    assert [row["arguments"]["shortcut"] for row in rows] == ["pad", "projection"]
    assert rows[0]["params"] == 122298 < rows[1]["params"]


def test_count_reads_any_callable(capsys: pytest.CaptureFixture[str]):
    result = json.loads(
        run(
            capsys,
            "count",
            "torch.nn:Conv2d",
            "--in_channels=3",
            "--out_channels=8",
            "--kernel_size=3",
            "--input-size=3,8,8",
            "--json",
        )
    )
    assert result["params"] == 3 * 8 * 9 + 8


def test_count_reads_folders_and_torchvision(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    thriftnet.save(thriftnet.convert(thriftnet.create_model("resnet20"), "soft-sharing(templates=2)"), tmp_path / "m")
    assert json.loads(run(capsys, "count", str(tmp_path / "m"), "--json"))["params"] == 122298
    result = json.loads(run(capsys, "count", "torchvision:resnet18", "--json"))
    assert (result["params"], result["macs"], result["input_size"]) == (11689512, 1814073344, [3, 224, 224])


def test_plan_convert_fold_round_trip(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    plan, small, plain = (str(tmp_path / name) for name in ("plan.json", "small", "plain"))
    printed = run(capsys, "plan", "resnet20", "--technique", "filter-basis(shared_rank=8)", "--output", plan)
    assert "relative error" in printed
    planned = json.loads(Path(plan).read_text())
    before, after = planned["params_before"], planned["params_after"]
    assert f"stored parameters: {before:,} -> {after:,} ({before / after:.2f}x fewer)" in printed
    made = json.loads(run(capsys, "convert", "resnet20", "--plan", plan, "--output", small, "--json"))
    assert made["params"] == json.loads(Path(plan).read_text())["params_after"]
    folded = json.loads(run(capsys, "fold", small, "--output", plain, "--json"))
    assert folded["max_relative_error"] < 1e-5
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(thriftnet.load(plain)(images), thriftnet.load(small)(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("technique", "prefer", "grows", "hint"),
    [
        ("soft-sharing(templates=2)", "", True, ""),
        ("filter-basis(shared_rank=8,unique_rank=4)", "", True, "; or give --prefer size, which stores 78,586 parameters"),
        ("filter-basis(shared_rank=8,unique_rank=4)", "size", True, ""),
        ("low-rank", "", True, "; or give --prefer size, which stores"),
        ("low-rank", "speed", False, ""),
        ("weight-sharing", "", False, ""),
    ],
)
def test_fold_says_that_a_network_grew(
    technique: str, prefer: str, grows: bool, hint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    small, plain = tmp_path / "small", tmp_path / "plain"
    converted = thriftnet.convert(thriftnet.create_model("resnet20"), technique)
    thriftnet.save(converted, small)
    command = ["fold", str(small), "--output", str(plain), *(["--prefer", prefer] if prefer else [])]
    printed, done = run(capsys, *command), json.loads(run(capsys, *command, "--json"))
    assert (done["bytes"] > done["bytes_before"]) == grows
    assert done["params"] == sum(p.numel() for p in thriftnet.fold(converted.eval(), prefer=prefer).parameters())
    assert abs(done["bytes"] - (plain / "model.safetensors").stat().st_size) < 20_000
    grown = f"note: it grew from {done['params_before']:,} to {done['params']:,} parameters"
    assert (grown in printed) == grows
    assert (f"to stay small, keep the converted network, {small}{hint}" in printed) == grows
    assert ("or give --prefer size" in printed) == bool(hint)


def test_fold_at_a_width(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    run(capsys, "convert", "resnet20", "--technique", "slimmable(widths=(0.5, 1.0))", "--output", str(tmp_path / "slim"))
    done = json.loads(
        run(capsys, "fold", str(tmp_path / "slim"), "--width", "0.5", "--output", str(tmp_path / "half"), "--json")
    )
    assert done["params"] < 80000
    assert done["max_relative_error"] < 1e-5
    run(capsys, "convert", str(tmp_path / "slim"), "--technique", "low-rank", "--output", str(tmp_path / "both"))
    thin = run(
        capsys, "fold", str(tmp_path / "both"), "--width", "0.5", "--prefer", "size", "--output", str(tmp_path / "thin")
    )
    assert json.loads(run(capsys, "count", str(tmp_path / "thin"), "--json"))["params"] < done["params"], thin
    assert "0.5, 1" in refused(capsys, "fold", str(tmp_path / "slim"), "--width", "0.3", "--output", str(tmp_path / "other"))


def test_a_timm_network_is_converted_saved_and_loaded(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    source = "torchvision:squeezenet1_1"
    run(capsys, "convert", source, "--technique", "weight-sharing", "--num_classes=7", "--output", str(tmp_path / "m"))
    assert thriftnet.load(tmp_path / "m")(torch.randn(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["cout"], "did you mean 'count'"),
        (["count", "resnet2"], "did you mean 'resnet"),
        (["count", "resnet20", "--num-clases", "3"], "did you mean '--num-classes'"),
        (["count", "resnet20", "--input-sise", "3,8,8"], "did you mean '--input-size'"),
        (["count", "hf-hub:someone/thin", "--selekt", "x"], "did you mean '--select'"),
        (["models", "--tecnique", "shift"], "did you mean '--technique'"),
        (["count", "missing.pth"], "no such file: 'missing.pth'"),
        (["count", "torch.nn:Identity"], "Identity does not state its input size: give input_size=(C, H, W)"),
        (["count", "resnet20", "--input-size", "3,x"], "3,32,32"),
        (["count", "resnet20", "--technique", "soft-sharin"], "did you mean 'soft-sharing'"),
        (["count", "resnet20", "--technique", "soft-sharing(template=2)"], "did you mean 'templates'"),
        (["count", "resnet20", "--technique", "soft-sharing(__import__('os'))"], "field=value"),
        (["count", "./nowhere"], "no such file"),
        (["count", "timm:resnet5"], "did you mean"),
        (["count", "no.such.module:thing"], "package.module:callable"),
        (["count"], "required"),
        (["count", "resnet20", "--sweep", "num_clases=3,4"], "did you mean 'num_classes'"),
        (["count", "resnet20", "--sweep", "num_classes"], "expected an argument and its values"),
        (["count", "resnet20", "--sweep", "num_classes=3", "--num-classes", "4"], "num_classes is given twice"),
        (["count", "resnet20", "--sweep", "num_classes=-3"], "num_classes=-3: expected an integer from 1"),
        (["count", "resnet20", "--plot", "x.svg"], "--plot draws what --sweep counts"),
        (["count", "resnet20", "--sweep", "num_classes=3", "--against", "resnet32"], "give one of them"),
        (["count", "resnet20", "--jsn"], "did you mean '--json'"),
        (["evaluate", "resnet20", "--dta", "digits"], "unknown option '--dta': did you mean '--data'"),
        (["plan", "resnet20", "-technique", "shift"], "unknown option '-technique': did you mean '--technique'"),
        (["train", "--data", "digits", "--outptu", "x"], "unknown option '--outptu': did you mean '--output'"),
        (["train", "--epoch", "3"], "unknown option '--epoch': did you mean '--epochs'"),
        (["import", "--outptu", "x"], "unknown option '--outptu': did you mean '--output'"),
        (["evaluate", "training:Net", "--data", "digits", "--limt", "3"], "argument 'limt'. Did you mean --limit"),
        (["plan", "resnet20", "--technique", "shift", "--select", "("], "not a regular expression"),
        (["plan", "resnet20", "--technique", "shift", "--select", "layer9"], "matches no layer"),
        (["convert", "resnet20", "--output", "x"], "either --technique or --plan"),
        (["convert", "resnet20", "--plan", "missing.json", "--output", "x"], "missing.json"),
        (["fold", "resnet20", "--output", "x"], "plain layers only"),
        (["demo", "--epochs", "0", "--output", "x"], "epochs 0: expected an integer from 1 to"),
        (["models", "nothing*"], "no model matches"),
        (["convert", "resnet20", "--technique", "shift", "--output", ""], "--output is empty"),
        (["train", "--model", "resnet20", "--data", "digits", "--output="], "--output is empty"),
        (["count", "no:\0thing"], "NUL"),
        (["demo", "--output", __file__], "is no folder"),
        (["search", "resnet20", "--data", "digits", "--macs", "1M", "--output", __file__], "is no model folder"),
        (["recipes", 5000 * "x"], "names of at most 255 bytes"),
        (["count", ":"], "package.module:callable"),
        (["count", "a\x1b[2J"], "unknown model 'a\\x1b[2J'"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_fold_takes_networks_that_are_thrifty_by_themselves(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    done = json.loads(run(capsys, "fold", "swrn16_1_2", "--output", str(tmp_path / "m"), "--json"))
    assert done["params"] == 175066  # as many templates as layers: only the 12 coefficients go
    assert "plain layers only" in refused(capsys, "fold", str(tmp_path / "m"), "--output", str(tmp_path / "again"))


# -- whatever happens, it is said in one line


def test_one_file_prints():
    """All else goes through it, so nothing unprintable reaches a terminal."""
    rooms = Path(thriftnet.__file__).parent
    files = (path for path in rooms.rglob("*.py") if path.name != "inert.py")  # which prints for the process that started it
    printing = re.compile(r"sys\.std(out|err)\b|^\s*print\(", re.MULTILINE)
    assert [path.name for path in files if printing.search(path.read_text())] == ["output.py"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyError("a\x1b[2J"), 70, "a fault of thriftnet, KeyError: 'a\\x1b[2J'. The traceback is in"),
        (RecursionError("deep"), 70, "RecursionError: deep"),
        (OSError(28, "No space left on device", "x"), 1, "No space left on device: x. The traceback is in"),
        (MemoryError(), 1, "there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "there is not enough memory"),
        (KeyboardInterrupt(), 130, "the same command starts over"),
        (KeyboardInterrupt("step 3 is saved"), 130, "step 3 is saved"),
    ],
)
def test_the_unforeseen_is_one_line_and_a_log(
    error: BaseException,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def fail(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr("thriftnet.cli.models.run", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["models", "a b"]) == code
    printed = capsys.readouterr()
    assert said in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    logs = [path.read_text() for path in tmp_path.iterdir()]
    assert len(logs) == (code != 130)
    assert all("Traceback (most recent" in log and "thriftnet models 'a b'" in log for log in logs)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device full of Linux")
@pytest.mark.parametrize("arguments", ["models", "models --json", "models --help", "--help", "--version"])
def test_output_that_nobody_takes_is_no_success(arguments: str):
    command = f"{sys.executable} -m thriftnet {arguments}"
    for redirected, said in ((">/dev/full", "No space left"), (">&-", "is closed"), ("2>&- >/dev/full", "")):
        done = subprocess.run(f"{command} {redirected}", shell=True, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, bool(said))
        assert said in done.stderr
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command.split(), stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, ""), "its reader went away, as head does"


def test_a_message_is_one_printable_line_with_its_end():
    said = str(thriftnet.ConfigError(f"layer 'a\x1b[2J\udcff{99_999 * 'x'}'\nis unknown. See --help"))
    assert said.startswith("layer 'a\\x1b[2J\\udcffxx")
    assert said.endswith("' is unknown. See --help")
    assert len(said) <= 2000


def test_json_has_no_numbers_of_its_own(capsys: pytest.CaptureFixture[str]):
    emit("", {"loss": float("nan"), "name": "\x7f\x9b\udcff"}, as_json=True)
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"loss": None, "name": "\x7f\x9b\udcff"}
    assert printed.rstrip().isprintable()
    assert printed.isascii()


def test_of_several_processes_one_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        emit(f"rank {rank}", {}, as_json=False)
        write_text(tmp_path / rank, "x")
    assert capsys.readouterr().out == "rank 0\n"
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


NAMES = ["$x$_^", "\udcff\x1b[2J", "a\nb<i>&", "x" * 200, "é日本\u202e"]


def test_class_names_of_all_kinds_are_saved_and_loaded(tmp_path: Path):
    model = thriftnet.create_model("resnet20", reduction=4, num_classes=len(NAMES))
    folder = thriftnet.save(model, tmp_path / "m", metadata={"class_names": NAMES, "data": "folder:\udcff"})
    assert list(data_facts(thriftnet.load(folder)).class_names or ()) == NAMES
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "\\udcff\\x1b[2J" in card
    assert all(line.isprintable() for line in card.splitlines())


def test_an_expression_that_takes_forever_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("thriftnet.core.patterns.SECONDS", 0.05)
    arguments = ["plan", "resnet20", "--technique", "shift", "--select", r"^(.?){40}(\w)\2{3}(.?){40}$"]
    assert "repetitions in repetitions" in refused(capsys, *arguments)


def test_a_network_for_other_channels_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    facts = {"normalisation": {"mean": [0.5] * 3, "std": [0.5] * 3}, "input_size": [3, 8, 8]}
    folder = thriftnet.save(thriftnet.create_model("resnet20", reduction=4), tmp_path / "m", metadata=facts)
    said = refused(capsys, "evaluate", str(folder), "--data", "digits")
    assert "was trained on images of 3 channels, those of digits have 1" in said


def test_select_needs_a_technique(capsys: pytest.CaptureFixture[str]):
    assert "--technique" in refused(capsys, "count", "resnet20", "--select", "layer1")


def test_further_arguments_are_those_of_the_plain_network_where_one_is_given(tmp_path: Path):
    parser = Parser("evaluate", "", "model", "--plain")
    words = [str(tmp_path), "--plain", "mine.nets:build", "--depth", "3"]
    assert parse_with_kwargs(parser, words)[1] == {"depth": 3}
    with pytest.raises(thriftnet.ConfigError, match=r"unknown option '--plan': did you mean '--plain'"):
        parse_with_kwargs(parser, [str(tmp_path), "--plan", "mine.nets:build"])
