"""The laws notice when they are broken: each is broken here on purpose, and must raise."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laws
import thriftnet as tn
from networks import LOOPED, NETWORKS, perturb
from thriftnet.core.conv import Convolution, GeneratedConv2d, is_convolution
from thriftnet.core.sites import Replacement, Site
from thriftnet.core.tied import Tied
from thriftnet.core.width import set_width
from thriftnet.techniques import TECHNIQUES
from thriftnet.techniques.filter_basis import SharedBasis

CHAIN = NETWORKS["chain"]
broken = pytest.raises(AssertionError)


class HonestConv2d(GeneratedConv2d):
    """A convolution with a scale for its weight: keeps the laws. Its heirs each break one."""

    def __init__(self, like: Convolution) -> None:
        super().__init__(like)
        self.source = nn.Parameter(like.weight.detach().clone())
        self.scale = nn.Parameter(torch.ones((), dtype=self.source.dtype))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.scale * self.source


class ForgetsBias(HonestConv2d):
    def fold(self) -> nn.Conv2d:
        conv = super().fold()
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        return conv


class ForgetsScale(HonestConv2d):
    def fold(self) -> nn.Conv2d:
        conv = super().fold()
        conv.weight.data.copy_(self.source)
        return conv


class FoldsOnlyTheWidest(HonestConv2d):
    def fold(self) -> nn.Conv2d:
        index, self.width_index = self.width_index, -1
        conv = super().fold()
        self.width_index = index
        return conv


class FoldsToItself(HonestConv2d):
    def fold(self) -> Any:
        return copy.deepcopy(self)


class Detached(HonestConv2d):
    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.scale.detach() * self.source


class NotTied(HonestConv2d):
    """Written under each of its names, as plain modules are."""

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        nn.Module._save_to_state_dict(self, *args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        nn.Module._load_from_state_dict(self, *args, **kwargs)


class Moody(HonestConv2d):
    """Computes something else under the compiler and in exported graphs."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + 1e-3 if torch.compiler.is_compiling() or torch.compiler.is_exporting() else out


class Breaking(HonestConv2d):
    """Cannot be one graph."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


@dataclass(frozen=True, kw_only=True)
class Replace:
    """Put ``layer`` in; with ``pairs`` one for two."""

    layer: type[HonestConv2d] = HonestConv2d
    pairs: bool = False

    def accepts(self, module: nn.Module) -> bool:
        return is_convolution(module)

    def group(self, sites: Sequence[Site[nn.Conv2d]]) -> list[list[Site[nn.Conv2d]]]:
        step = 2 if self.pairs else 1
        return [list(sites[i : i + step]) for i in range(0, len(sites), step)]

    def build(self, group: Sequence[Site[nn.Conv2d]]) -> list[Replacement]:
        layer = self.layer(group[0].module)
        return [(site.module, layer) for site in group]


def made(layer: type[HonestConv2d], pairs: bool = False, seed: int = 0) -> nn.Module:
    return perturb(tn.convert(CHAIN.make(seed), Replace(layer=layer, pairs=pairs))).eval()


def test_the_honest_layer_keeps_the_laws(tmp_path: Path) -> None:
    model, x = made(HonestConv2d, pairs=True), CHAIN.image()
    laws.law_input_untouched(CHAIN.make(), Replace())
    laws.law_full_capacity(CHAIN.make(), Replace(), x)
    laws.law_fold_is_equal(model, x)
    laws.law_fold_is_plain(model)
    laws.law_gradients(model, x)
    laws.law_no_dense_leftover(CHAIN.make(), Replace())
    laws.law_state_dict(model, made(HonestConv2d, pairs=True, seed=7), x)
    laws.law_copies_keep_ties(model, x)
    laws.law_compiles(model, x)
    laws.law_average_moves_once(model)
    laws.law_exports(model, x)
    laws.law_onnx(model, x, tmp_path / "model.onnx")


def test_01_convert_that_changes_its_input() -> None:
    for technique in (Replace(), tn.WeightSharing(), tn.Slimmable(widths=(0.5, 1.0))):
        with broken:
            laws.law_input_untouched(CHAIN.make(), technique, convert=lambda m, t: tn.convert(m, t, inplace=True))

    def convert_and_train(model: nn.Module, technique: Any) -> nn.Module:
        model.train()
        return tn.convert(model, technique)

    def convert_sharing_memory(model: nn.Module, technique: Any) -> nn.Module:
        converted = tn.convert(model, technique)
        converted.head.weight = model.head.weight
        return converted

    for convert in (convert_and_train, convert_sharing_memory):
        with broken:
            laws.law_input_untouched(CHAIN.make(), Replace(), convert=convert)


def test_01_plan_that_tells_something_else() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wavering(Replace):
        def group(self, sites: Sequence[Site[nn.Conv2d]]) -> list[list[Site[nn.Conv2d]]]:
            return super().group(sites)[: 1 + calls.pop()]

    calls = [3, 1]  # another number of layers at each call
    with broken:
        laws.law_plan_is_dry(CHAIN.make(), Wavering())


def test_01_plan_that_mutates() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Outside(Replace):
        def build(self, group: Sequence[Site[nn.Conv2d]]) -> list[Replacement]:
            model.head.bias.data.add_(1)
            return super().build(group)

    model = CHAIN.make()
    with broken:
        laws.law_plan_is_dry(model, Outside())


def test_02_less_than_full_capacity() -> None:
    for technique, select in (
        (tn.WeightSharing(rate=2), None),
        (tn.SoftSharing(templates=3), CHAIN.equal_layers),
        (tn.FilterBasis(shared_rank=30, unique_rank=0), CHAIN.equal_inputs),
        (tn.Shift(expansion=2.0), None),
    ):
        with broken:
            laws.law_full_capacity(CHAIN.make(), technique, CHAIN.image(), select)
    with broken:
        laws.law_full_capacity(CHAIN.make(), Replace(), CHAIN.image(), convert=lambda m, t, select: copy.deepcopy(m))


@pytest.mark.parametrize("layer", [ForgetsBias, ForgetsScale])
def test_03_fold_that_computes_something_else(layer: type[HonestConv2d]) -> None:
    with broken:
        laws.law_fold_is_equal(made(layer), CHAIN.image())


def test_03_fold_that_changes_its_input() -> None:
    with broken:
        laws.law_fold_is_equal(made(HonestConv2d), CHAIN.image(), fold=lambda model: tn.fold(model, inplace=True))


def test_03_fold_that_forgets_the_width() -> None:
    model = tn.convert(tn.convert(CHAIN.make(), Replace(layer=FoldsOnlyTheWidest)), tn.Slimmable(widths=(0.5, 1.0)))
    perturb(model).eval()
    with pytest.raises((AssertionError, RuntimeError)):  # the channels no longer fit together
        laws.law_fold_is_equal(model, CHAIN.image())

    def folds_widest(model: nn.Module) -> nn.Module:
        wide = copy.deepcopy(model)
        set_width(wide, "largest")
        return tn.fold(wide)

    model = perturb(tn.convert(CHAIN.make(), tn.Slimmable(widths=(0.5, 1.0)))).eval()
    with broken:
        laws.law_fold_is_equal(model, CHAIN.image(), fold=folds_widest)


def test_03_outputs_that_prove_nothing() -> None:
    silent = made(HonestConv2d)
    nn.init.zeros_(silent.head.weight), nn.init.zeros_(silent.head.bias)
    with broken:
        laws.law_fold_is_equal(silent, CHAIN.image())
    nn.init.ones_(silent.head.bias)
    with broken:
        laws.law_fold_is_equal(silent, CHAIN.image())


def test_04_fold_that_leaves_something() -> None:
    with broken:
        laws.law_fold_is_plain(made(FoldsToItself))
    with broken:
        laws.law_fold_is_plain(made(HonestConv2d), fold=copy.deepcopy)


def test_05_parameter_without_gradient() -> None:
    with broken:
        laws.law_gradients(made(Detached), CHAIN.image())


def test_05_parameter_with_zero_gradient() -> None:
    model = made(HonestConv2d)
    model.head.spare = nn.Parameter(torch.ones(1, dtype=torch.float64))
    model.head.register_forward_hook(lambda head, args, out: out + 0 * head.spare)
    with broken:
        laws.law_gradients(model, CHAIN.image())


def test_05_dense_leftover() -> None:
    class KeepsDense(tn.SConv2d):
        def keep(self, like: nn.Conv2d) -> KeepsDense:
            self._parameters["weight"] = nn.Parameter(like.weight.detach().clone())
            return self

    @dataclass(frozen=True, kw_only=True)
    class Leftover(Replace):
        def build(self, group: Sequence[Site[nn.Conv2d]]) -> list[Replacement]:
            conv = group[0].module
            bank = tn.TemplateBank(2, conv.in_channels, conv.out_channels, 3).double()
            return [(conv, KeepsDense(bank, bias=True).double().keep(conv))]

    @dataclass(frozen=True, kw_only=True)
    class Nothing(Replace):
        def build(self, group: Sequence[Site[nn.Conv2d]]) -> list[Replacement]:
            return [(site.module, copy.deepcopy(site.module)) for site in group]

    for technique in (Leftover(), Nothing()):
        with broken:
            laws.law_no_dense_leftover(CHAIN.make(), technique)


def test_05_penalty_counted_twice() -> None:
    def once_per_name(model: nn.Module) -> Tensor:
        banks = [m for _, m in model.named_modules(remove_duplicate=False) if isinstance(m, SharedBasis)]
        return torch.stack([bank.penalty_term().total for bank in banks]).sum() / banks[0].penalty_term().count

    def scaled(model: nn.Module) -> Tensor:
        return tn.penalty(model)

    def unaveraged(model: nn.Module) -> Tensor:
        return sum(m.penalty_term().total for m in model.modules() if isinstance(m, SharedBasis))

    model = perturb(tn.convert(CHAIN.make(), tn.FilterBasis(shared_rank=4)))
    laws.law_penalty_once(model)
    for penalty in (once_per_name, scaled, unaveraged, lambda model: laws.unscaled_penalty(model).detach()):
        with broken:
            laws.law_penalty_once(model, penalty=penalty)
    with broken:
        laws.law_penalty_once(CHAIN.make(), penalty=lambda model: torch.ones(()))


def test_06_layer_that_is_not_tied() -> None:
    with broken:
        laws.law_state_dict(made(NotTied, pairs=True), made(NotTied, pairs=True, seed=7), CHAIN.image())
    with broken:
        laws.law_state_dict(LOOPED.make(), LOOPED.make(7), LOOPED.image())  # plain PyTorch writes a tied layer twice


def test_06_state_dict_that_forgets() -> None:
    class Forgetful(HonestConv2d):
        def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination.pop(f"{prefix}scale")

    with broken:
        laws.law_state_dict(made(Forgetful), made(Forgetful, seed=7), CHAIN.image())


def test_06_state_dict_that_changes_values() -> None:
    class Rounds(HonestConv2d):
        def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}source"].mul_(1 + 1e-9)

        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
            state_dict[f"{prefix}source"] = state_dict[f"{prefix}source"].float().double()
            super()._load_from_state_dict(state_dict, prefix, *args)

    with broken:
        laws.law_state_dict(made(Rounds), made(Rounds, seed=7), CHAIN.image())


def test_07_aliases_that_are_refused_or_forgotten() -> None:
    with pytest.raises((AssertionError, RuntimeError)):  # PyTorch's own strict loading refuses the single alias
        laws.law_aliases(made(NotTied, pairs=True), lambda: made(NotTied, pairs=True, seed=7), CHAIN.image())

    class NeverMissing(HonestConv2d):
        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
            for name, tensor in self._own_tensors().items():
                state_dict.setdefault(prefix + name, tensor.detach())
            super()._load_from_state_dict(state_dict, prefix, *args)

    with broken:
        laws.law_aliases(made(NeverMissing, pairs=True), lambda: made(NeverMissing, pairs=True, seed=7), CHAIN.image())
    with broken:
        laws.law_aliases(made(HonestConv2d), lambda: made(HonestConv2d, seed=7), CHAIN.image())  # nothing is tied


class LosesScaleInPickle(HonestConv2d):
    def __getstate__(self) -> dict[str, Any]:
        state = copy.copy(super().__getstate__())
        state["_parameters"] = {**state["_parameters"], "scale": nn.Parameter(torch.ones((), dtype=torch.float64))}
        return state


def test_08_copies_that_lose_something(monkeypatch: pytest.MonkeyPatch) -> None:
    with broken:
        laws.law_copies_keep_ties(made(LosesScaleInPickle), CHAIN.image())
    model = made(HonestConv2d, pairs=True)
    monkeypatch.setattr(type(model), "__deepcopy__", _untie, raising=False)
    with broken:
        laws.law_copies_keep_ties(model, CHAIN.image())


def _untie(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    new = CHAIN.make()
    for position, conv in enumerate(model.convs):
        new.convs[position] = copy.deepcopy(conv)
    return new


def test_09_layer_that_differs_when_compiled() -> None:
    with broken:
        laws.law_compiles(made(Moody), CHAIN.image())
    with pytest.raises(torch._dynamo.exc.Unsupported):
        laws.law_compiles(made(Breaking), CHAIN.image())


def test_11_specs_that_do_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Doubling:
        factor: float = 1.0

        def __post_init__(self) -> None:
            object.__setattr__(self, "factor", self.factor * 2)

    monkeypatch.setitem(TECHNIQUES.public, "doubling", ("Doubling",))
    monkeypatch.setitem(sys.modules, TECHNIQUES.file("doubling"), SimpleNamespace(Doubling=Doubling))  # type: ignore[misc]
    with broken:
        laws.law_spec(Doubling(factor=3.0))


def test_12_third_outcomes() -> None:
    first, second = tn.Slimmable(widths=(0.5, 1.0)), Replace(layer=ForgetsBias)
    with broken:
        laws.law_pair(CHAIN.make(), first, second, CHAIN.image())

    def skips(model: nn.Module, technique: Any) -> nn.Module:
        return copy.deepcopy(model) if technique == second else tn.convert(model, technique)

    with broken:
        laws.law_pair(CHAIN.make(), first, second, CHAIN.image(), convert=skips)

    def crashes(model: nn.Module, technique: Any) -> nn.Module:
        if technique == second:
            raise RuntimeError("shapes do not fit")
        return tn.convert(model, technique)

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        laws.law_pair(CHAIN.make(), first, second, CHAIN.image(), convert=crashes)


def test_13_conversion_that_does_nothing_silently() -> None:
    with broken:
        laws.law_nothing_to_convert(Replace(), convert=lambda model, technique: copy.deepcopy(model))

    def mumbles(model: nn.Module, technique: Any) -> nn.Module:
        raise tn.IncompatibleModelError("cannot do that")

    with broken:
        laws.law_nothing_to_convert(Replace(), convert=mumbles)


def test_14_tied_weight_that_moves_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    class PerName(laws.AveragedModel):
        """Averages the state dict by name, as some libraries do: once per alias."""

        def update_parameters(self, model: nn.Module) -> None:
            mine = dict(self.module.named_parameters(remove_duplicate=False))
            for name, value in model.named_parameters(remove_duplicate=False):
                old = mine[name].detach()
                old.copy_(value.detach() if self.n_averaged == 0 else self.avg_fn(old, value.detach(), 1))
            self.n_averaged += 1

    monkeypatch.setattr(laws, "AveragedModel", PerName)
    laws.law_average_moves_once(made(HonestConv2d))
    with broken:
        laws.law_average_moves_once(made(HonestConv2d, pairs=True))


def test_16_export_that_differs(tmp_path: Path) -> None:
    with broken:
        laws.law_exports(made(Moody), CHAIN.image())
    model = made(Moody)
    for layer in model.modules():
        if isinstance(layer, Moody):
            layer.scale.data.fill_(3.0)
    with broken:
        laws.law_onnx(model, CHAIN.image(), tmp_path / "model.onnx")


def test_ties_are_real() -> None:
    assert all(isinstance(m, Tied) for m in made(HonestConv2d, pairs=True).convs)
