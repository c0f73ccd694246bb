"""Odd networks are converted exactly or refused in one line; and a small part of `make compat`."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from compat import __main__ as command  # noqa: E402
from compat import cell as cells  # noqa: E402
from compat import odd, page, runner  # noqa: E402
from compat.cell import Cell, Plain, measure  # noqa: E402
from compat.sample import Sample  # noqa: E402

import thriftnet as tn  # noqa: E402
from thriftnet.core.history import history  # noqa: E402
from thriftnet.core.probe import IgnoreOuterModes, Inputs, on_meta, tensors  # noqa: E402
from thriftnet.core.spec import parse_spec  # noqa: E402
from thriftnet.errors import CheckpointError, ConfigError, IncompatibleModelError  # noqa: E402
from thriftnet.techniques import TECHNIQUES  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
ODD = {sample.name.removeprefix("odd:"): sample for sample in odd.samples()}

EXACT = [  # what would be lost or computed wrongly without a word, and is kept
    ("SharedParameter", "weight-sharing(rate=2)"),
    ("SharedWithHead", "shift"),
    ("extra_attributes", "shift"),
    ("replaced_forward", "low-rank"),
    ("slots", "shift"),
    ("own_fold", "shift"),
    ("names_of_ours", "shift"),
    ("network_hook", "weight-sharing"),
    ("ExtraState", "weight-sharing"),
    ("Lock", "weight-sharing"),
    ("Generator", "weight-sharing"),
    ("NoMeta", "weight-sharing"),
    ("OnlyInList", "weight-sharing"),
    ("two_inputs", "weight-sharing"),
    ("dict_input", "weight-sharing"),
    ("DataclassOutput", "weight-sharing"),
    ("fixed_size", "weight-sharing"),
    ("inference_tensors", "weight-sharing"),
    ("Functional", "filter-basis"),
    ("StandardisedByHand", "filter-basis"),
    ("ReadsAttributes", "low-rank"),
    ("Transformer", "slimmable"),
    ("scripted_child", "slimmable"),
    ("Lock", "slimmable"),
    ("DataclassOutput", "slimmable"),
    ("dict_input", "slimmable"),
    ("tokens", "slimmable"),
    ("multiplying_depthwise", "shift"),
    ("signals", "weight-sharing(fusion='scalar_weighted_mean')"),
    ("signals", "soft-sharing"),
    ("volumes", "weight-sharing"),
    ("volumes", "soft-sharing"),
]
REFUSED = [  # and what is refused, with the layer and what to do
    ("InList", "weight-sharing", "old layer 'blocks.0' goes on running.*nn.ModuleList"),
    ("InDict", "soft-sharing", "old layer 'blocks.0' goes on running.*nn.ModuleList"),
    ("BoundMethod", "shift", "old layer 'blocks.0' goes on running.*bound method"),
    ("InPartial", "weight-sharing", "old layer 'blocks.3' goes on running.*Exclude it"),
    ("HiddenFromRegistration", "shift", "old layer 'blocks.0' goes on running"),
    ("ExactType", "shift", "new layer 'layers.0' runs 0 times, the old one 1: .*Exclude it: select="),
    ("ByClassName", "weight-sharing", "new layer 'layers.0' runs 0 times, the old one 2: "),
    ("ByParameterName", "weight-sharing", "does not run any more: KeyError 'blocks.1.weight'"),
    ("InTuple", "slimmable", "nothing to narrow in InTuple: .* the code of InTuple fixes their number"),
    ("FixedView", "slimmable", "nothing to narrow in FixedView: .* the code of FixedView fixes their number"),
    ("forward_hook", "weight-sharing", "'blocks.0' has forward hooks"),
    ("backward_hook", "weight-sharing", "'blocks.0' has backward hooks"),
    ("state_dict_hook", "weight-sharing", "'blocks.0' has state-dict hooks"),
    ("load_hook", "weight-sharing", "'blocks.0' has hooks on loading"),
    ("old_spectral_norm", "weight-sharing", "'blocks.0' is .* has forward pre-hooks.*spectral norm"),
    ("replaced_forward", "slimmable", "nothing to narrow in Body"),
    ("SharedParameter", "slimmable", "'blocks.0.weight' and 'blocks.1.weight' are one parameter"),
    ("data_parallel", "shift", r"DataParallel only wraps.*convert\(model.module, ...\)"),
    ("averaged", "shift", r"AveragedModel only wraps.*convert\(model.module, ...\)"),
    ("compiled", "shift", r"OptimizedModule only wraps.*convert\(model._orig_mod, ...\)"),
    ("Lazy", "shift", "'stem.weight' of Lazy has no shape yet"),
]


@pytest.mark.parametrize(("name", "technique"), EXACT)
def test_kept(name: str, technique: str) -> None:
    cell = measured(ODD[name], technique)
    assert (cell.verdict, cell.reason) == ("exact", "")


@pytest.mark.parametrize(("name", "technique", "message"), REFUSED)
def test_refused(name: str, technique: str, message: str) -> None:
    model = ODD[name].build()[0]
    children = [dict(module._modules) for module in model.modules()]
    with pytest.raises(IncompatibleModelError, match=message) as error:
        tn.convert(model, technique, inplace=True)
    assert "\n" not in str(error.value)
    assert [dict(module._modules) for module in model.modules()] == children, "a refused conversion changes nothing"


def measured(sample: Sample, technique: str) -> Cell:
    config: Any = parse_spec(technique, TECHNIQUES)
    return measure(sample, Plain(sample), config, technique.partition("(")[0])


# -- what is checked, and what is not


class TakesWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)
        self.convs = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.convs(self.embed(words)[..., None].transpose(1, 2)).mean((2, 3)))


def test_a_plan_says_what_was_not_checked() -> None:
    words = torch.randint(0, 9, (2, 5))
    assert "not checked by running: TakesWords runs on none of the image sizes" in str(
        tn.plan(TakesWords(), "weight-sharing")
    )
    for example in (words, (words,), {"words": words}):
        assert "not checked" not in str(tn.plan(TakesWords(), "weight-sharing", example=example))
    unused = ODD["NeverRun"].build()[0]
    planned = tn.plan(unused, "weight-sharing")
    assert "do not run in eval mode: 'auxiliary.0.0', 'auxiliary.1.0'" in str(planned)
    assert type(planned).from_json(planned.to_json()).not_checked == planned.not_checked


class ReadsPlainWeights(nn.Module):
    """Attention of torch reads a weight without running its layer; and so do we, of plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.attention = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))
        self.mix = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for each in self.attention:
            x = x + each(x, x, x)[0]
        for each in self.mix:
            x = x + (x @ each.weight if type(each) is nn.Linear else x)
        return self.head(x.mean(1))


def test_weights_that_are_read_without_running_the_layer() -> None:
    model = ReadsPlainWeights()
    assert not tn.plan(model, "low-rank", select="attention").not_checked
    with pytest.raises(IncompatibleModelError, match=r"new layer 'mix\.0' is not read, as the old one was"):
        tn.convert(model, "low-rank")


def test_a_given_input_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"Body does not run on input_size=\(7, 8, 8\)"):
        tn.convert(odd.Body(), "weight-sharing", input_size=(7, 8, 8))
    with pytest.raises(ConfigError, match="Body does not run on the given example"):
        tn.convert(odd.Body(), "weight-sharing", example=torch.ones(2, 5))
    with pytest.raises(ConfigError, match="example=3: expected a tensor"):
        tn.convert(odd.Body(), "weight-sharing", example=3)


def test_an_example_is_kept_in_the_config() -> None:
    batch = {"image": torch.ones(2, 3, 16, 16), "weight": torch.ones(2), "names": ["a", None, 3]}
    planned = tn.plan(ODD["dict_input"].build()[0], "slimmable", example=(batch,))
    again = Inputs.from_text(planned.technique.example)  # type: ignore[union-attr]
    assert again.args[0].keys() == batch.keys()
    assert again.args[0]["names"] == batch["names"]
    assert [(t.shape, t.dtype) for t in tensors(again)] == [(t.shape, t.dtype) for t in tensors(batch)]
    with pytest.raises(ConfigError, match="the example cannot be kept: it holds a Generator"):
        Inputs((torch.Generator(),), {}).to_text()
    with pytest.raises(ConfigError, match="'nonsense' is no description of inputs"):
        tn.convert(odd.Body(), "slimmable(example='nonsense')")


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_on_the_meta_device(kind: str, bidirectional: bool) -> None:
    """Their shapes are computed without running them."""
    layer = getattr(nn, kind)(3, 5, num_layers=2, bidirectional=bidirectional, batch_first=True)
    x = torch.randn(2, 7, 3)
    with IgnoreOuterModes():
        found = on_meta(layer)(x.to("meta"))
    assert [t.shape for t in tensors(found)] == [t.shape for t in tensors(layer(x))]
    packed = nn.utils.rnn.pack_padded_sequence(x, [7, 4], batch_first=True)
    with IgnoreOuterModes():
        assert torch.equal(layer(packed)[0].data, layer(packed)[0].data)


@pytest.mark.parametrize("name", ["Counter", "NoMeta", "Lock"])
def test_the_check_leaves_no_trace(name: str) -> None:
    model = ODD[name].build()[0].train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    tn.convert(model, "weight-sharing", inplace=True, select="^blocks.[01].0$")
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if "blocks" not in key)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_hook_on_a_gradient_is_not_lost_by_copying() -> None:
    with pytest.raises(IncompatibleModelError, match=r"parameter 'blocks.0.weight' has a hook on its gradient"):
        tn.convert(odd.parameter_hook(), "weight-sharing", select="^blocks.[12]")


def test_tensors_on_a_layer_are_not_lost() -> None:
    model = odd.Body(odd.conv)
    model.blocks[0].register_buffer("steps", torch.zeros(1))
    with pytest.raises(
        IncompatibleModelError, match=r"layer 'blocks.0' holds 'steps', which its replacement, a ShiftConv2d"
    ):
        tn.convert(model, "shift")


def test_layers_that_share_a_parameter_are_left_alone() -> None:
    converted = tn.convert(odd.SharedParameter(), "weight-sharing")
    reasons = dict(history(converted)[-1]["plan"]["left"])
    assert reasons["blocks.0"] == "'blocks.0.weight' is one parameter with 'blocks.1.weight': new layers would not share it"
    assert converted.blocks[0].weight is converted.blocks[1].weight


def test_what_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"entry '_extra_state' is a Tensor.*Make it a buffer"):
        tn.save(odd.TensorExtraState(), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"entry 'head\._packed_params\.dtype' is a dtype"):
        tn.save(odd.quantised(), tmp_path / "b")
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_extra_state_comes_back(tmp_path: Path) -> None:
    model = odd.ExtraState()
    tn.save(tn.convert(model, "weight-sharing"), tmp_path)
    assert tn.load(tmp_path, model=model).loaded == {"steps": 3}


# -- the table


def test_a_small_part_of_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("processes are forked and watched as Linux does")
    assert command.main(["--quick", "--cells", str(tmp_path / "cells.jsonl")]) == 0, capsys.readouterr().out[-3000:]
    again = runner.Cells(tmp_path / "cells.jsonl")
    assert len(again.done) >= 12 * len(TECHNIQUES)
    text = page._results(again.done, command.configs_of(None))
    assert "What should not be" not in text


def test_the_list_is_of_all_families() -> None:
    names = [sample.name for sample in command.select(command.parse([]))]
    assert len(names) == len(set(names))
    assert sum(name.startswith("odd:") for name in names) >= 60
    assert sum(name.startswith(("timm:", "torchvision:")) for name in names) >= 180


class Hangs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while True:
            pass


class Kills(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        import os

        os._exit(7)


@pytest.mark.parametrize(("kind", "reason"), [(Hangs, "no end within 0.2 s"), (Kills, "the process ended with code 7")])
def test_a_crash_or_a_hang_is_a_cell(kind: type[nn.Module], reason: str) -> None:
    sample = Sample("bad", lambda: (kind(), ((torch.ones(1),), {})))
    done = runner.Cells(None)
    runner.run_all([sample], {"shift": tn.Shift(), "slimmable": tn.Slimmable()}, done, limit=0.2)
    assert [(cell.verdict, cell.reason.startswith(reason)) for cell in done.done.values()] == [("crash", True)] * 2


def broken_fold(model: nn.Module, **options: Any) -> nn.Module:
    folded = FOLD(model, **options)
    folded.blocks[1].bias.data += 1e-3
    return folded


def broken_load(folder: Any, *, model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


FOLD = tn.fold


@pytest.mark.parametrize(
    ("verb", "broken", "expected"),
    [
        ("fold", broken_fold, "the folded network computes something else"),
        ("load", broken_load, "the loaded network has other"),
    ],
)
def test_the_checks_can_fail(verb: str, broken: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sample("body", lambda: (torch.manual_seed(0) and odd.Body(odd.conv), ((torch.randn(2, 3, 16, 16),), {})))
    plain = Plain(sample)
    monkeypatch.setattr(cells.tn, verb, broken)
    cell = measure(sample, plain, tn.WeightSharing(), "weight-sharing")
    assert cell.verdict == "wrong"
    assert cell.reason.startswith(expected)
