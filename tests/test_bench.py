"""`python -m benchmarks` and `thriftnet bench`: what they refuse to time, what they print, and when they fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import cases
from benchmarks.measuring import Case, Fact, Measured, Ratio, Settings, Target, UnequalError, measure
from benchmarks.report import Results, conditions, floors, picture
from torch import nn

from thriftnet.cli import bench, main
from thriftnet.cli.machine import use_allocator, use_threads
from thriftnet.errors import IncompatibleModelError
from thriftnet.measure import latency
from thriftnet.measure.latency import Spread


def a_case(**changes: object) -> Case:
    x = torch.ones(3)
    fields = {"variants": {"one": lambda: x * 2, "two": lambda: x + x}, "ratios": [Ratio("one", "two")], "rounds": 3}
    return Case("topic", "name", **{**fields, **changes})  # type: ignore[arg-type]


def test_unequal_variants_are_not_timed() -> None:
    x = torch.ones(3)
    with pytest.raises(
        UnequalError, match=r"topic, name: 'two' and 'one' differ in result 0 by 5\.0e-01 .*nothing was timed"
    ):
        measure(a_case(variants={"one": lambda: x * 2, "two": lambda: x * 3}), Settings())
    with pytest.raises(UnequalError, match="by inf"):
        measure(a_case(variants={"one": lambda: x, "two": lambda: x[:2]}), Settings())
    with pytest.raises(UnequalError):
        measure(a_case(variants={"one": lambda: x, "two": lambda: x * float("nan")}, tolerance=1.0), Settings())
    measure(a_case(variants={"one": lambda: x, "two": lambda: x * 3}, apart=frozenset({"two"})), Settings())


def test_ratios_are_medians_over_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"one": iter([1.0, 1.0, 2.0, 30.0]), "two": iter([1.0, 1.0, 1.0, 10.0])}  # the first to warm up
    x = torch.ones(1)
    variants = {name: (lambda name=name: x) for name in seconds}
    monkeypatch.setattr(latency, "seconds", lambda run, *_: next(seconds[run.__defaults__[0]]))
    found = measure(a_case(variants=variants), Settings())
    assert found.ratios[0][1].median == 2.0
    assert found.ms["one"].median == 2000.0


def test_every_variant_has_one_turn_per_round_in_changing_order() -> None:
    order: list[str] = []
    x = torch.ones(1)
    variants = {name: (lambda name=name: (order.append(name), x)[1]) for name in ("a", "b", "c")}
    latency.time_rounds(variants, 20, turn=0.0)
    rounds = [order[3:][start : start + 3] for start in range(0, 60, 3)]  # after the warm-up
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 2


def test_a_turn_of_a_short_variant_is_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"short": 0.005, "long": 1.0, "tiny": 1e-9}
    turns: dict[str, set[int]] = {name: set() for name in spent}

    def seconds(run: Any, calls: int, *_: Any) -> float:
        turns[run.__defaults__[0]].add(calls)
        return spent[run.__defaults__[0]]

    monkeypatch.setattr(latency, "seconds", seconds)
    x = torch.ones(1)
    variants = {name: (lambda name=name: x) for name in spent}
    measure(a_case(variants=variants, ratios=[]), Settings())
    assert turns == {"short": {1, 4}, "long": {1}, "tiny": {1, 50}}  # once to warm up


def test_targets() -> None:
    low, high = Target("P1", "x", 2.5), Target("P2", "y", 3.0, "at least")
    assert low.is_met(2.5)
    assert not low.is_met(2.51)
    assert high.is_met(3.0)
    assert not high.is_met(2.9)
    assert (str(low), str(high)) == ("P1 <= 2.5", "P2 >= 3")


def results(*, fast_malloc: bool = False, quick: bool = False, size: float | None = None) -> Results:
    spread = Spread(3.0, 2.9, 3.2)
    ratios = [
        (Ratio("one", "two", Target("P1", "x", 2.5)), spread),
        (Ratio("one", "two", Target("P2", "x", 4.0), "mallopt"), spread),
        (Ratio("one", "two", Target("P3", "x", 1.0), "no mallopt"), spread),
        (Ratio("one", "two"), spread),
    ]
    found = Results(conditions("any", quick), fast_malloc)
    found.measured.append(Measured("shift", "case, NCHW", {"one": spread, "two": Spread(1.0, 1.0, 1.0)}, ratios, size))
    found.facts.append(Fact("shift", "file", 0.5, Target("P4", "x", 0.6)))
    return found


def test_targets_hold_under_their_conditions_only() -> None:
    assert [row.bound for row in results().missed()] == ["P1 <= 2.5", "P3 <= 1"]
    assert [row.bound for row in results(fast_malloc=True).missed()] == ["P1 <= 2.5"]
    assert not results(quick=True).missed()
    written = json.loads(json.dumps(results().to_dict()))
    assert written["missed"] == ["P1 <= 2.5", "P3 <= 1"]
    assert {"torch", "machine", "threads", "allocator", "quick"} == set(written["conditions"])


def test_floors_are_drawn_with_both_sides() -> None:
    found = results()
    spread = found.measured[0].ms["one"]
    ratios = [(Ratio("thriftnet", "floor"), spread), (Ratio("naive", "floor"), Spread(30.0, 29.0, 31.0))]
    found.measured.append(Measured("shift", "both sides", {"thriftnet": spread, "floor": spread}, ratios))
    drawn = floors(found)
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert drawn.count(">both sides") == 1
    assert "case, NCHW" not in drawn


@pytest.mark.parametrize("size", [None, 4.0])
def test_pictures_are_svg(size: float | None) -> None:
    drawn = picture(results(size=size))
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert drawn == picture(results(size=size))


@pytest.mark.parametrize("topic", ["shift", "soft-sharing", "filter-basis"])  # others need a compiler or processes
def test_every_topic_runs(topic: str) -> None:
    found = list(cases(topic, Settings(quick=True)))
    assert found
    for case in found:
        if isinstance(case, Case):
            assert measure(case, Settings(quick=True)).ratios


def test_sweeps_have_sizes() -> None:
    for topic in ("shift", "soft-sharing"):
        first = next(iter(cases(topic, Settings(sweep=True))))
        assert isinstance(first, Case)
        assert first.size is not None


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        assert command.main(["shift", "--quick", "--check", "--svg", str(tmp_path / "x.svg"), "--json"]) == 0
    finally:
        torch.set_num_threads(threads)
    written = json.loads(capsys.readouterr().out)
    assert {row["topic"] for row in written["rows"]} == {"shift"}
    assert written["conditions"]["threads"] == 1
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_a_missed_target_gives_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "measured", lambda topics, options: results())
    assert command.main(["shift", "--check"]) == 1
    assert "MISSED" in capsys.readouterr().out
    assert command.main(["shift"]) == 0


def test_several_topics_run_in_a_process_each() -> None:
    """As the command is started, not as a function of this process."""
    command = [sys.executable, "-m", "benchmarks", "--quick", "--json", "shift", "filter-basis"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert {row["topic"] for row in json.loads(done.stdout)["rows"]} == {"shift", "filter-basis"}


def test_unknown_topics(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        command.main(["shfit"])
    assert "unknown topic 'shfit': expected shift, soft-sharing" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ thriftnet bench


def no_compiler(model: nn.Module, images: torch.Tensor) -> Any:
    raise RuntimeError("no compiler\nand a long trace")


def bench_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    network = ["wrn", "--depth", "16", "--width", "1"]
    threads = torch.get_num_threads()
    try:
        assert main(["bench", *network, "--rounds", "2", "--device", "cpu", *arguments, "--json"]) == 0
    finally:
        torch.set_num_threads(threads)
    return json.loads(capsys.readouterr().out)


def test_a_network_is_timed_in_every_implementation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(bench.IMPLEMENTATIONS, "compiled", no_compiler)
    picture = tmp_path / "x.svg"
    options = ["--technique", "soft-sharing(templates=2)", "--batch-size", "1", "2", "--threads", "1", "2"]
    written = bench_json(capsys, *options, "--svg", str(picture))
    timed = {
        (row["threads"], row["batch_size"], row["network"], row["implementation"]) for row in written["rows"] if row["ms"]
    }
    ran = [("as it is", "eager"), ("as it is", "packed")]
    ran += [("soft-sharing(templates=2)", name) for name in ("eager", "folded", "packed")]
    assert timed == {(threads, batch, *key) for threads in (1, 2) for batch in (1, 2) for key in ran}
    for row in written["rows"]:
        if row["ms"]:
            assert 0 < row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
            assert row["speedup"]["median"] == 1 or (row["network"], row["implementation"]) != ran[0]
    notes = {(row["network"], row["implementation"]): row["note"] for row in written["rows"] if row["note"]}
    assert notes == {
        ("as it is", "folded"): "plain layers only: nothing to fold",
        ("as it is", "compiled"): "no compiler",
        ("soft-sharing(templates=2)", "compiled"): "no compiler",
    }
    assert written["conditions"]["input_size"] == [3, 32, 32]
    assert ElementTree.fromstring(picture.read_text()).tag.endswith("svg")
    assert ">batch 2, 2 threads</text>" in picture.read_text()


def test_speedups_are_against_the_network_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    monkeypatch.setattr(bench, "IMPLEMENTATIONS", {name: lambda model, images: model for name in ("eager", "other")})
    times = {"eager": [3.0, 8.0, 9.0], "other": [1.0, 2.0, 9.0]}
    monkeypatch.setattr(latency, "time_rounds", lambda runs, rounds, device: {key: times[key[1]] for key in runs})
    options = SimpleNamespace(batch_size=[4], threads=[1], rounds=3)
    rows = bench.measured(model, [], (3, 5, 5), torch.device("cpu"), options)
    assert [(row.implementation, row.ms.median, row.speedup.median) for row in rows] == [
        ("eager", 8e3, 1),
        ("other", 2e3, 3),
    ]


def test_what_computes_something_else_or_does_not_convert_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 4, 1, groups=1), nn.Flatten()), torch.ones(1, 3, 2, 2)
    networks, left_out = bench.converted(model, ["shift()"])
    assert list(networks) == ["as it is"]
    assert left_out.keys() == {("shift()", "eager")}
    wrong = {"eager": lambda model, images: model, "wrong": lambda model, images: lambda x: model(x) * 1.1}
    monkeypatch.setattr(bench, "IMPLEMENTATIONS", wrong)
    left_out = {}
    with torch.no_grad():
        assert [key for key, _ in bench.runnable(networks, images, left_out)] == [("as it is", "eager")]
    assert "outputs differ by 1.0e-01" in left_out["as it is", "wrong"]
    with pytest.raises(IncompatibleModelError, match="packing is for CPUs"):
        bench.packed(model, images.to("meta"))


def test_wrong_use_of_bench(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in {
        ("resnet20", "--batch-size", "0"): "--batch-size 0: expected an integer from 1 to",
        ("resnet20", "--rounds", "0"): "--rounds 0: expected an integer from 1 to",
        ("resnet20", "--threads", "1", "-2"): "--threads",
        ("resnet20", "--technique", "shfit()"): "did you mean 'shift'",
        ("resnet20", "--input-size", "4,32,32"): "got (1, 4, 32, 32)",
    }.items():
        assert main(["bench", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_threads() -> None:
    before = torch.get_num_threads()
    try:
        assert use_threads(1) == 1
        assert use_threads(8, 2) == 2
        assert use_threads(8) == 2
    finally:
        torch.set_num_threads(before)
    assert use_allocator(fast_malloc=False)


@pytest.mark.parametrize("verb", ["train", "evaluate", "recalibrate", "search", "demo", "bench"])
def test_long_jobs_take_threads_and_allocator(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main([verb, "--help"])
    helped = capsys.readouterr().out
    assert "--threads" in helped
    assert "--fast-malloc" in helped
    words = {
        "train": ["--data", "digits", "--output", str(tmp_path / "run")],
        "demo": ["--output", str(tmp_path)],
        "bench": ["resnet20"],
    }
    images = ["resnet20", "--data", "digits", "--output", str(tmp_path), "--macs", "1M"]
    given = words.get(verb, images[: {"evaluate": 3, "recalibrate": 5}.get(verb, 7)])
    assert main([verb, *given, "--threads", "0"]) == 2
    assert "--threads 0: expected an integer from 1 to" in capsys.readouterr().err


def test_single_images_run_on_one_thread(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    arguments = ["evaluate", "resnet20", "--in-chans", "1", "--data", "digits", "--limit", "3", "--json"]
    try:
        torch.set_num_threads(2)
        assert main([*arguments, "--batch-size", "3"]) == 0
        assert torch.get_num_threads() == 2
        assert main([*arguments, "--batch-size", "1"]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_fast_malloc_in_a_process_of_its_own() -> None:
    import subprocess
    import sys

    if sys.platform != "linux":
        pytest.skip("mallopt is glibc's, on Linux")
    code = "from thriftnet.cli.machine import use_allocator as use; print(use(fast_malloc=True)); import torch; torch.ones(10**7)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mallopt" in done.stdout
