"""A small part of `make faults`, and that it would notice what should not happen."""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from faults import __main__ as command  # noqa: E402
from faults import commands, datasets, disk, kills, mutants, page, watch  # noqa: E402
from faults.data_damages import Damage  # noqa: E402
from faults.figure import Figure, Length, bits, ended  # noqa: E402
from faults.samples import Sample, make_samples  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and watched as Linux does")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("figure", [name for name in command.FIGURES if name != "trainings"])
def test_a_small_part_of_each_figure(figure: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([figure, "--quick", "--json"]) == 0, capsys.readouterr().out[-2000:]
    result = json.loads(capsys.readouterr().out)["figures"][figure]
    assert result["failures"] == []
    assert all(len(row) == len(result["head"]) for row in result["rows"])
    assert sum(row[{"hostile": 2, "writers": 0, "datasets": 2}.get(figure, 1)] for row in result["rows"]) > 1


def test_trainings_are_killed_and_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from faults import trainings

    monkeypatch.setattr(trainings, "RECIPE", {**trainings.RECIPE, "epochs": 1})
    figure = trainings.measure(tmp_path, 0, Length.QUICK)
    assert figure.failures == []
    assert figure.rows[0][-1] == figure.rows[0][0] == 1


# -- each check can fail


class Strange(Sample):
    """A file that is opened in another way than it should be."""

    way: Any

    @property
    def open(self) -> Any:
        return self.way


def strange(way: Any, *, checked: bool = False) -> Strange:
    sample = Strange("strange", "torch zip", b"x", checked=checked)
    object.__setattr__(sample, "way", way)
    return sample


def raising(error: BaseException) -> Any:
    def way(path: Path) -> torch.nn.Module:
        raise error

    return way


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (raising(ValueError("x")), "it raised ValueError"),
        (raising(watch.CheckpointError("no reason")), "refused with 'no reason'"),
        (lambda path: raising(watch.CheckpointError(f"{path}: there is not enough memory"))(path), "refused with"),
        (lambda path: torch.nn.Linear(2, 2), "a checksum should have failed"),
    ],
)
def test_what_should_not_happen_to_a_file_is_noticed(way: Any, said: str, tmp_path: Path) -> None:
    found = watch.judge(strange(way, checked=True), b"y", tmp_path, {})
    assert found.outcome == watch.FAILED
    assert said in found.reason


def test_memory_and_hangs_and_crashes_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def large(path: Path) -> torch.nn.Module:
        fresh = mmap.mmap(
            -1, watch.CONSTANT + watch.ROOM // 2
        )  # what is allocated may lie in memory that the parent had freed
        for start in range(0, len(fresh), mmap.PAGESIZE):
            fresh[start] = 1
        return torch.nn.Linear(2, 2)

    ways = [large, lambda path: time.sleep(3600), lambda path: torch.nn.Linear(2, 2), lambda path: sys.exit(3)]

    def work(index: int) -> list[watch.Judgement]:
        monkeypatch.setattr(watch, "LONGEST", 0.1 if index == 1 else 600)  # the others may be slow on a busy machine
        return [watch.judge(strange(ways[index]), b"y", tmp_path, None)]

    found = list(watch.in_workers(len(ways), work, tmp_path, 1))
    assert [each.outcome for each in found] == [watch.FAILED, watch.FAILED, watch.OTHER, watch.FAILED], found
    assert "bytes of memory" in found[0].reason
    assert "number 1: no answer" in found[1].reason
    assert "number 3: the process died with 1" in found[3].reason


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (commands.Outcome(0, "fine\n", "", ["new"]), ""),
        (commands.Outcome(2, "", "thriftnet count: no\n", []), ""),
        (commands.Outcome(70, "", "thriftnet: a fault\n", []), "exit code 70"),
        (commands.Outcome(2, "", "thriftnet count: no\nreally\n", []), "2 lines of refusal"),
        (commands.Outcome(2, "", "thriftnet count: no\n", ["new/.lock"]), "left or changed"),
        (commands.Outcome(0, "\x1b[2J\n", "", []), "the character '\\x1b' is printed"),
        (commands.Outcome(0, "", "Traceback (most recent call last)\n", []), "a traceback"),
        (commands.Outcome(0, "fine\n", "", []), "no JSON"),
        (commands.Outcome(commands.HANGS, "", "", []), "no answer"),
    ],
)
def test_what_a_command_line_should_not_do_is_noticed(outcome: commands.Outcome, said: str) -> None:
    found = commands.problem(outcome, as_json=said == "no JSON")
    assert (said in found) if said else not found


def test_every_option_is_among_those_that_are_tried() -> None:
    known = commands.parsers()
    assert known.keys() == commands.VERBS.keys() == commands.SOUND.keys()
    assert "--sweep-budget" in known["evaluate"].known


def test_a_save_in_place_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import thriftnet as tn

    whole_save = tn.save

    def save(model: torch.nn.Module, place: Path, *, metadata: dict[str, float]) -> None:
        if metadata["value"] == 1.0:
            whole_save(model, place, metadata=metadata)
        else:
            (place / "model.safetensors").write_bytes(b"half")

    monkeypatch.setattr(tn, "save", save)
    figure = Figure("", [])
    kills._series(figure, "an earlier network", tmp_path / "f", 2, kills.random.Random(0), 1.0)
    assert any("is not a model file" in failure for failure in figure.failures)
    assert figure.rows[0][-1] > 0


def test_a_save_that_no_limit_stops_is_no_full_disk(tmp_path: Path) -> None:
    figure = Figure("", [])
    with disk._row(figure, "none") as check:
        check(disk._prepared(tmp_path / "m"), lambda: None)
    assert figure.rows == [["none", 1, 0, 0, 1]]
    assert "it was saved" in figure.failures[0]


def test_side_effects_are_seen(tmp_path: Path) -> None:
    from faults.figure import forked
    from faults.hostile import Watch

    def look() -> None:
        watch, record = Watch(), []
        for act in (
            lambda: (tmp_path / "file").read_bytes(),
            lambda: (tmp_path / "other").write_text("x"),
            lambda: (tmp_path / "file").write_text("x"),
            lambda: __import__("this"),
            lambda: compile("1", "x", "eval"),
        ):
            with watch.over(tmp_path / "file") as seen:
                act()
            record.append(bool(seen))
        (tmp_path / "record").write_text(json.dumps(record))

    (tmp_path / "file").write_text("x")
    assert ended(forked(look)) == 0
    assert json.loads((tmp_path / "record").read_text()) == [False, True, True, True, True]


def opened_as(images: dict[str, tuple[int, str]], said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every data set opened as these images."""
    source = type("Source", (), {"skipped": (), "splits": {}})
    monkeypatch.setattr(datasets, "open_data", lambda spec, on_corrupt: source)
    monkeypatch.setattr(datasets, "contents", lambda source, root: (images, said))


@pytest.mark.parametrize(
    ("images", "said", "reason"),
    [
        ({"a.png": (0, "x")}, [], "b.png is missing without a word"),
        ({"a.png": (0, "x")}, ["/set/a.png is broken"], "refused with"),
        ({"a.png": (0, "x")}, ["b.png is broken"], "refused with"),
        ({"a.png": (0, "x")}, ["/set/b.png\nunclear"], "refused with"),
        ({"a.png": (1, "x"), "b.png": (0, "y")}, [], "a.png was (0, 'x'), is (1, 'x')"),
        ({"a.png": (0, "x"), "b.png": (0, "y"), "c.png": (0, "z")}, [], "c.png is new"),
    ],
)
def test_what_should_not_happen_to_a_data_set_is_noticed(
    images: dict[str, tuple[int, str]], said: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_as(images, said, monkeypatch)
    before = {"a.png": (0, "x"), "b.png": (0, "y")}
    outcome, why = datasets.judge("", Path("/set"), before, Damage("", {"b.png"}), skip=False)
    assert outcome == watch.FAILED
    assert reason in why
    opened_as({"a.png": (0, "x")}, ["/set/b.png is broken"], monkeypatch)
    assert datasets.judge("", Path("/set"), before, Damage("", {"b.png"}), skip=False) == (datasets.FEWER, "")
    assert datasets.judge("", Path("/set"), before, Damage("", {"b.png"}, refused=True), skip=False)[0] == watch.FAILED


# -- what these figures found, and was repaired


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [('"model":', '"mo`el":', "model is missing"), ('"convert"', '"con(ert"', "unknown step 'con(ert'")],
)
def test_a_changed_word_in_a_config_is_refused_with_the_folder(old: str, new: str, said: str, tmp_path: Path) -> None:
    sample = next(sample for sample in make_samples(tmp_path, quick=True) if sample.part == "config.json")
    place = sample.put(sample.data.replace(old.encode(), new.encode(), 1), tmp_path)
    with pytest.raises(watch.CheckpointError) as caught:
        sample.open(place)
    assert said in str(caught.value)
    assert str(place) in str(caught.value)


def test_pipes_and_endless_files_in_a_folder_are_not_waited_for(tmp_path: Path) -> None:
    import thriftnet as tn

    place = tn.save(tn.create_model("resnet20"), tmp_path / "m")
    for put in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (place / "model.safetensors").unlink()
        put(place / "model.safetensors")
        with pytest.raises(watch.CheckpointError, match="it is a device or pipe"):
            tn.load(place)
        with pytest.raises(watch.CheckpointError, match="it is a device or pipe"):
            tn.save(tn.create_model("resnet20"), place)


# -- what is changed, and what is written


def test_changes_are_the_same_for_a_seed(tmp_path: Path) -> None:
    samples = [s for s in make_samples(tmp_path, quick=True) if s.part is None][:2]
    sound = [bits(sample.open(sample.put(sample.data, tmp_path))) for sample in samples]

    def judged(seed: int) -> list[watch.Judgement]:
        changed = mutants.Changed(samples, sound, tmp_path, seed)
        found = [changed.of_bytes(index)[0] for index in range(20)] + changed.structure(0, 10)
        return [watch.Judgement(each.format, each.outcome, each.reason) for each in found]

    assert judged(1) == judged(1)
    assert judged(1) != judged(2)


def test_samples_of_every_format_are_made(tmp_path: Path) -> None:
    formats = {sample.format for sample in make_samples(tmp_path, quick=True)}
    assert formats >= {"torch zip", "torch zip without checksums", "torch legacy", "torch legacy, Python 2", "safetensors"}
    assert sum(name.startswith("our file") for name in formats) == 3


def test_results_are_put_between_the_markers(tmp_path: Path) -> None:
    place = tmp_path / "page.md"
    place.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write_page(
        place, {"one": Figure("One", ["what", "count"], [["a", 12345]], ["it broke"], ["A note."])}, 3, Length.USUAL
    )
    text = place.read_text()
    assert text.startswith(f"before\n{page.BEGIN}\n")
    assert text.endswith(f"{page.END}\nafter\n")
    assert "old" not in text
    assert "| a | 12,345 |" in text
    assert "**1 failure in all.**" in text
    assert "Failure: it broke" in text
    place.write_text("nothing")
    with pytest.raises(ValueError, match="lacks the lines"):
        page.write_page(place, {}, 0, Length.USUAL)


def test_the_page_has_every_figure_and_no_failure() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    results = text.partition(page.BEGIN)[2].partition(page.END)[0]
    assert results.count("\n### ") == len(command.FIGURES)
    assert "**No failures in all.**" in results
    assert str(Path.home()) not in text


def test_command_line_that_makes_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nothing"], ["--quick", "--page", "x"]):
        with pytest.raises(SystemExit):
            command.main(arguments)
    assert "possible are kills, disk" in capsys.readouterr().err
