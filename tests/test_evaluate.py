"""Accuracy, loss and confusion against counts by hand; the same on two processes; what the command line says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thriftnet as tn
from evaluating import measured, measured_by_two, network
from images import class_folders, png
from thriftnet.cli import main
from thriftnet.data.sources import open_data
from thriftnet.report.plots import confusion_matrix, decisions
from thriftnet.train.evaluate import evaluate
from training import in_children

SHARED = Path(__file__).parents[2] / "shared" / "data"


class Table(nn.Module):
    """Gives the logits of a table; images are row numbers."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x.long().flatten()]


def batches(labels: Tensor, size: int = 7) -> list[tuple[Tensor, Tensor]]:
    rows = torch.arange(len(labels)).float()
    return list(zip(rows.split(size), labels.split(size), strict=True))


def test_figures_equal_counts_by_hand():
    logits = torch.randn(60, 6, dtype=torch.float64)
    labels = torch.arange(60) % 5  # no image of the last class
    result = evaluate(Table(logits), batches(labels), topk=(1, 3), confusion=True, classes="abcdef")
    order = logits.argsort(1, descending=True).tolist()
    wanted = {k: 100 * sum(label in row[:k] for row, label in zip(order, labels.tolist(), strict=True)) / 60 for k in (1, 3)}
    assert result.accuracies == pytest.approx(wanted)
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-12)
    assert result.images == 60
    matrix = [[0] * 6 for _ in range(6)]
    for row, label in zip(order, labels.tolist(), strict=True):
        matrix[label][row[0]] += 1
    assert [list(row) for row in result.confusion] == matrix
    assert result.per_class == pytest.approx((*(100 * matrix[i][i] / 12 for i in range(5)), None))
    plain = evaluate(Table(logits), batches(labels), topk=(1, 3), classes="abcdef")
    assert plain.per_class == result.per_class
    assert plain.confusion is None
    assert result.to_dict() == {
        "top1": result.top1,
        "top3": result.accuracies[3],
        "loss": result.loss,
        "images": 60,
        "images_per_second": pytest.approx(result.images_per_second, abs=0.1),
        "per_class": dict(zip("abcdef", result.per_class, strict=True)),
        "confusion": matrix,
    }
    assert result.top5 is None


def test_more_guesses_than_classes_are_always_right():
    result = evaluate(Table(torch.randn(9, 3)), batches(torch.arange(9) % 3))
    assert result.top5 == 100
    assert result.top1 < 100


def test_batches_of_any_size_give_the_same():
    logits, labels = torch.randn(50, 4, dtype=torch.float64), torch.arange(50) % 4
    one, other = (evaluate(Table(logits), batches(labels, size), confusion=True) for size in (50, 3))
    assert one.loss == pytest.approx(other.loss, rel=1e-12)
    assert (one.accuracies, one.confusion) == (other.accuracies, other.confusion)


def test_a_network_that_gives_no_numbers_is_never_right():
    logits = torch.full((10, 3), float("nan"))
    result = evaluate(Table(logits), batches(torch.zeros(10, dtype=torch.int64)))
    assert result.accuracies == {1: 0, 5: 0}
    assert result.per_class[0] == 0
    assert result.to_dict()["loss"] is None


def test_the_network_is_left_as_it_was():
    model = network()
    model.train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = [(torch.randn(4, 3, 12, 12), torch.arange(4))]
    first = evaluate(model, images)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert evaluate(model.eval(), images).loss == first.loss


def test_progress_is_reported_after_every_batch():
    seen: list[int] = []
    evaluate(Table(torch.randn(10, 3)), batches(torch.zeros(10, dtype=torch.int64), 4), on_batch=seen.append)
    assert seen == [4, 8, 10]


def test_two_processes_equal_one(tmp_path: Path):
    counts = (50, 1)  # with one image, the first process has none
    for results in measured_by_two(counts, tmp_path):
        for images, result in zip(counts, results, strict=True):
            alone = measured(images)
            assert result.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-12)
            assert result == alone


def broken_after(given: list[tuple[Tensor, Tensor]], error: Exception) -> Iterator[tuple[Tensor, Tensor]]:
    yield from given
    raise error


@pytest.mark.parametrize(("error", "said"), [(tn.DataError("9.png"), r"^9\.png$"), (RuntimeError("odd"), "odd")])
def test_an_error_of_one_process_ends_both_with_its_message(error: Exception, said: str, tmp_path: Path):
    def work(rank: int) -> None:
        given = batches(torch.zeros(8, dtype=torch.int64))
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=rank, world_size=2)
        with pytest.raises(type(error), match=said):
            evaluate(Table(torch.randn(8, 3)), broken_after(given, error) if rank else given)
        shapes = [(image.view(-1, 1, 1, 1).expand(-1, 3, 12, 12), label) for image, label in given]
        with pytest.raises(type(error), match=said):
            tn.recalibrate(network(), broken_after(shapes, error) if rank else shapes)

    assert in_children(work, 2) == [0, 0]


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (torch.zeros(3), r"a batch is \(Tensor\): expected \(images, labels\)"),
        ((torch.zeros(3), [0, 1, 2]), r"a batch is \(Tensor, list\)"),
        ((torch.zeros(3), torch.zeros(3)), r"labels torch\.float32 \(3,\)"),
        ((torch.zeros(3), torch.zeros(3, 5, dtype=torch.int64)), r"labels torch\.int64 \(3, 5\)"),
        ((torch.zeros(3), torch.zeros(2, dtype=torch.int64)), r"labels torch\.int64 \(2,\)"),
        ((torch.zeros(3), torch.tensor([0, -100, 1])), "the label -100"),
        ((torch.zeros(3), torch.tensor([0, 2_000_000_000, 1])), "the label 2000000000"),
    ],
)
def test_batches_that_are_not_images_and_labels_are_refused(batch: object, said: str):
    with pytest.raises(tn.DataError, match=said):
        evaluate(Table(torch.randn(8, 3)), [batch])  # type: ignore[list-item]


def test_labels_of_any_integer_type_and_empty_batches_count_alike():
    logits, labels = torch.randn(8, 3), torch.arange(8) % 3
    wanted = evaluate(Table(logits), batches(labels)).per_class
    assert evaluate(Table(logits), [*batches(labels.to(torch.uint8)), (torch.zeros(0), labels[:0])]).per_class == wanted


def test_images_without_numbers_are_wrong_in_the_confusion_too():
    logits = torch.eye(3)[[0, 1, 2, 0]]
    logits[3] = float("nan")  # topk ranks the first NaN highest: class 0, which is its label
    result = evaluate(Table(logits), batches(torch.tensor([0, 1, 2, 0])), confusion=True)
    assert result.per_class == (50, 100, 100)
    assert result.top1 == 75
    assert result.confusion == ((1, 0, 0), (0, 1, 0), (0, 0, 1))


def test_what_cannot_be_evaluated_is_refused():
    labels = torch.arange(4)
    with pytest.raises(tn.IncompatibleModelError, match="has 3 classes, the data has 4"):
        evaluate(Table(torch.randn(4, 3)), batches(labels % 3), classes="abcd")
    with pytest.raises(tn.DataError, match="label 3, the network has 3 classes"):
        evaluate(Table(torch.randn(4, 3)), batches(labels))
    with pytest.raises(tn.IncompatibleModelError, match=r"outputs \(4, 3, 1\) for 4 images"):
        evaluate(Table(torch.randn(4, 3, 1)), batches(labels))
    with pytest.raises(tn.DataError, match="no images"):
        evaluate(Table(torch.randn(4, 3)), [])
    with pytest.raises(tn.ConfigError, match=r"expected a list .an integer from 1 to"):
        evaluate(Table(torch.randn(4, 3)), [], topk=(0,))
    with pytest.raises(tn.ConfigError, match="two have the same name"):
        evaluate(Table(torch.randn(4, 3)), batches(labels % 3), classes=("a", "b", "a"))


@pytest.mark.filterwarnings("error")
def test_names_of_all_kinds_are_drawn_as_they_are():
    names = ["$x$_^", "\udcff\x1b[2J", "a\nb<i>&--", "x" * 200, "é日本\u202e", "\0"]
    square = [[int(i == j) for i in range(len(names))] for j in range(len(names))]
    for drawn in (confusion_matrix(square, names), decisions(square, names, names)):
        found = [text.text for text in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
        assert {"$x$_^", "\\udcff\\x1b[2J", "a\\nb<i>&--", f"{'x' * 39}…", "é日本\\u202e", "\\x00"} <= set(found)


def test_a_confusion_matrix_is_drawn_with_counts_and_names():
    drawn = confusion_matrix([[3, 1], [0, 4]], ["cat", "dog"])
    assert drawn.startswith("<svg")
    assert all(f">{text}</text>" in drawn for text in ("cat", "dog", "taken for", "3", "1", "4"))
    assert confusion_matrix([[3, 1], [0, 4]], ["cat", "dog"]) == drawn
    many = confusion_matrix([[int(i == j) for j in range(40)] for i in range(40)], list(map(str, range(40))))
    assert len(many) < 100_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved network for grey images of 8 x 8 pixels, 10 classes."""
    torch.manual_seed(0)
    model = tn.create_model("resnet20", in_chans=1)
    return tn.save(
        model.eval(), tmp_path / "net", metadata={"input_size": [1, 8, 8], "normalisation": {"mean": [0.3], "std": [0.4]}}
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["evaluate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["evaluate", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_command_prints_what_the_function_measures(capsys: pytest.CaptureFixture[str], folder: Path):
    result = json.loads(run(capsys, folder, "--data", "digits", "--topk", "1,2,5", "--json"))
    images = open_data("digits").splits["test"]
    x = (images.resident().float() / 255 - 0.3) / 0.4
    with torch.no_grad():
        logits = tn.load(folder)(x)
    assert result["top1"] == pytest.approx(100 * float((logits.argmax(1) == images.labels).float().mean()))
    assert result["loss"] == pytest.approx(float(F.cross_entropy(logits, images.labels)), rel=1e-4)
    assert (result["images"], len(result["per_class"])) == (450, 10)
    assert result["top1"] <= result["top2"] <= result["top5"]
    text = run(capsys, folder, "--data", "digits")
    assert f"top-1 {result['top1']:.2f} %" in text
    assert "450 images" in text


def test_options_win_over_the_folder_and_the_folder_over_the_data(capsys: pytest.CaptureFixture[str], folder: Path):
    losses = [
        json.loads(run(capsys, folder, "--data", "digits", "--json", *options))["loss"]
        for options in ([], ["--mean", "0.3", "--std", "0.4"], ["--mean", "0.1", "--std", "0.4"])
    ]
    assert losses[0] == losses[1] != losses[2]
    plain = json.loads(run(capsys, "resnet20", "--in-chans", "1", "--data", "digits", "--json", "--limit", "30"))
    assert plain["images"] == 30


def test_a_run_is_evaluated_by_its_network(capsys: pytest.CaptureFixture[str], folder: Path):
    (folder.parent / "run").mkdir()
    (folder.parent / "run" / "run.json").write_text("{}")
    direct = json.loads(run(capsys, folder, "--data", "digits", "--json"))
    folder.rename(folder.parent / "run" / "model")
    assert json.loads(run(capsys, folder.parent / "run", "--data", "digits", "--json"))["loss"] == direct["loss"]


def test_confusion_as_table_json_and_picture(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path):
    assert "class \\ predicted" in run(capsys, folder, "--data", "digits", "--confusion")
    drawn = tmp_path / "confusion.svg"
    result = json.loads(run(capsys, folder, "--data", "digits", "--confusion-plot", drawn, "--json"))
    assert sum(map(sum, result["confusion"])) == 450
    assert drawn.read_text().startswith("<svg")


def test_images_are_brought_to_the_size_of_the_network(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    class_folders(tmp_path / "data" / "train")
    class_folders(tmp_path / "data" / "val", per_class=3)
    (tmp_path / "data" / "val" / "cat" / "wide.png").write_bytes(png(5, width=30, height=17))
    arguments = ("resnet20", "--num-classes", "2", "--data", f"folder:{tmp_path / 'data'}", "--json")
    result = json.loads(run(capsys, *arguments))  # the network states 32
    assert (result["images"], result["split"]) == (7, "val")
    assert json.loads(run(capsys, *arguments, "--image-size", "16", "--resize", "18", "--workers", "1"))["images"] == 7


def test_broken_images_are_fatal_or_skipped(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    class_folders(tmp_path / "test", per_class=3)
    (tmp_path / "test" / "dog" / "1.png").write_bytes(b"text")
    arguments = ("resnet20", "--num-classes", "2", "--data", f"folder:{tmp_path}")
    assert "1.png cannot be decoded" in refused(capsys, *arguments)
    assert main(["evaluate", *arguments, "--on-corrupt", "skip", "--json"]) == 0
    captured = capsys.readouterr()
    assert "1 broken images are left out" in captured.err
    assert json.loads(captured.out)["images"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet20", "--data", "digits"), "reads images"),
        (
            ("resnet20", "--in-chans", "1", "--num-classes", "7", "--data", "digits"),
            "has 7 classes, the data has 10",
        ),
        (("resnet20", "--in-chans", "1", "--data", "digitz"), "did you mean 'digits'"),
        (("resnet20", "--in-chans", "1", "--data", "digits", "--split", "val"), "no split 'val'"),
        (("resnet20", "--in-chans", "1", "--data", "digits", "--topk", "0"), "expected a list .an integer from 1 to"),
        (("resnet20", "--in-chans", "1", "--data", "digits", "--topk", "one"), "--topk one"),
        (("resnet20", "--in-chans", "1", "--data", "digits", "--mean", "0.5,0.5"), "as many numbers"),
        (("resnet20", "--in-chans", "1", "--data", "digits", "--device", "gpu"), "--device gpu is not possible"),
        (("resnet20", "--in-chans", "1", "--data", "digits", "--confusion-plot", "x.png"), r"ends in \.svg"),
        (("resnet20",), "data"),
    ],
)
def test_wrong_use_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str):
    assert re.search(message, refused(capsys, *arguments))


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the project's shared material beside the checkout")
def test_resnet20_of_the_wider_world_keeps_its_accuracy(capsys: pytest.CaptureFixture[str]):
    weights, data = SHARED / "weights" / "resnet20-12fca82f.th", f"parquet:{SHARED / 'cifar10-jpeg'}"
    normalisation = ("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
    result = json.loads(run(capsys, weights, "--data", data, *normalisation, "--json"))
    assert (result["top1"], result["images"]) == (81.03, 10000)


@pytest.mark.parametrize("option", [["--budget", "3M"], ["--plot", "x.svg"]])
def test_options_of_a_mode_need_one(option: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", "resnet20", "--data", "digits", "--in-chans", "1", *option]) == 2
    assert f"{option[0]} goes with --mode" in capsys.readouterr().err
