"""The bench: what it refuses to time, what it prints, and when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from benchmarks import cases, measuring
from benchmarks.measuring import Case, Fact, Measured, Ratio, Settings, Spread, Target, UnequalError, measure
from benchmarks.report import Results, conditions, floors, picture

import thriftnet as tn
from thriftnet.cli import main
from thriftnet.runtime_options import allocator, use_threads


def a_case(**changes: object) -> Case:
    x = torch.ones(3)
    fields = {"forms": {"one": lambda: x * 2, "two": lambda: x + x}, "ratios": [Ratio("one", "two")], "rounds": 3}
    return Case("topic", "name", **{**fields, **changes})  # type: ignore[arg-type]


def test_unequal_forms_are_not_timed() -> None:
    x = torch.ones(3)
    with pytest.raises(
        UnequalError, match=r"topic, name: 'two' and 'one' differ in result 0 by 5\.0e-01 .*nothing was timed"
    ):
        measure(a_case(forms={"one": lambda: x * 2, "two": lambda: x * 3}), Settings())
    with pytest.raises(UnequalError, match="by inf"):
        measure(a_case(forms={"one": lambda: x, "two": lambda: x[:2]}), Settings())
    with pytest.raises(UnequalError):
        measure(a_case(forms={"one": lambda: x, "two": lambda: x * float("nan")}, tolerance=1.0), Settings())
    measure(a_case(forms={"one": lambda: x, "two": lambda: x * 3}, apart=frozenset({"two"})), Settings())


def test_ratios_are_medians_over_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"one": iter([1.0, 1.0, 2.0, 30.0]), "two": iter([1.0, 1.0, 1.0, 10.0])}  # the first to warm up
    x = torch.ones(1)
    forms = {name: (lambda name=name: x) for name in seconds}
    monkeypatch.setattr(measuring, "cpu_seconds", lambda run, calls=1: next(seconds[run.__defaults__[0]]))
    found = measure(a_case(forms=forms), Settings())
    assert found.ratios[0][1].median == 2.0
    assert found.ms["one"].median == 2000.0


def test_every_form_has_one_turn_per_round_in_changing_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "TURN", 0.0)
    order: list[str] = []
    x = torch.ones(1)
    forms = {name: (lambda name=name: (order.append(name), x)[1]) for name in ("a", "b", "c")}
    measure(a_case(forms=forms, ratios=[], rounds=20), Settings())
    rounds = [order[6:][start : start + 3] for start in range(0, 60, 3)]  # after the check and the warm-up
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 2


def test_a_turn_of_a_short_form_is_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"short": 0.005, "long": 1.0, "tiny": 1e-9}
    turns: dict[str, set[int]] = {name: set() for name in spent}

    def seconds(run: Any, calls: int = 1) -> float:
        turns[run.__defaults__[0]].add(calls)
        return spent[run.__defaults__[0]]

    monkeypatch.setattr(measuring, "cpu_seconds", seconds)
    x = torch.ones(1)
    forms = {name: (lambda name=name: x) for name in spent}
    measure(a_case(forms=forms, ratios=[]), Settings())
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
    assert drawn.count("<!-- both sides") == 1  # matplotlib notes each text
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
        assert main(["bench", "shift", "--quick", "--check", "--svg", str(tmp_path / "x.svg"), "--json"]) == 0
    finally:
        torch.set_num_threads(threads)
    written = json.loads(capsys.readouterr().out)
    assert {row["topic"] for row in written["rows"]} == {"shift"}
    assert written["conditions"]["threads"] == 1
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_a_missed_target_gives_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from thriftnet.cli import bench

    monkeypatch.setattr(bench, "_measured", lambda topics, options: results())
    assert main(["bench", "shift", "--check"]) == 1
    assert "MISSED" in capsys.readouterr().out
    assert main(["bench", "shift"]) == 0


def test_unknown_topics(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "shfit"]) == 2
    assert "unknown topic 'shfit': did you mean 'shift'" in capsys.readouterr().err


def test_threads() -> None:
    before = torch.get_num_threads()
    try:
        assert use_threads(1) == 1
        assert use_threads(8, 2) == 2
        assert use_threads(8) == 2
        with pytest.raises(tn.ConfigError, match="--threads 0: possible is a whole number of at least 1"):
            use_threads(1, 0)
    finally:
        torch.set_num_threads(before)
    assert allocator()


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
        "bench": [],
    }
    images = ["resnet20", "--data", "digits", "--output", str(tmp_path), "--macs", "1M"]
    given = words.get(verb, images[: {"evaluate": 3, "recalibrate": 5}.get(verb, 7)])
    assert main([verb, *given, "--threads", "0"]) == 2
    assert "--threads 0: possible is a whole number of at least 1" in capsys.readouterr().err


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
    code = "from thriftnet.runtime_options import use_fast_malloc; print(use_fast_malloc()); import torch; torch.ones(10**7)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mallopt" in done.stdout
