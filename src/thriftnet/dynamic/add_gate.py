"""Adding a gate to a slimmable network: layers before it run at full width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from thriftnet.arguments import checked
from thriftnet.core import probe
from thriftnet.core.conv import GeneratedConv2d
from thriftnet.core.copied import copied
from thriftnet.core.history import record
from thriftnet.core.sites import replace
from thriftnet.core.width import (
    WidthAware,
    WidthSpec,
    format_width,
    require_widths,
    select_width,
    slimmable_layers,
    widths,
)
from thriftnet.dynamic.gate import SplitPoint, SqueezeGate, gates
from thriftnet.dynamic.split import Split, is_within, split_at
from thriftnet.errors import IncompatibleModelError


@checked
def add_gate(model: nn.Module, after: str | None = None, *, inplace: bool = False) -> nn.Module:
    """Give a slimmable network a gate that chooses the width for each image, see `DynamicNetwork`.

    The layers before the gate run at full width in every sub-network. The gate is not trained yet.

    Args:
        model: A network converted by `Slimmable`, without a gate.
        after: Name of the module that ends the front; the gate reads its output. Default: the first stage.
        inplace: Change ``model`` itself.

    Raises:
        ConfigError: No such module.
        IncompatibleModelError: The network has one width only, no ratios, or a gate already; or the front cannot end there.

    Example:
        >>> from thriftnet.models import create_model
        >>> from thriftnet.techniques import convert
        >>> slim = convert(create_model("resnet20"), "slimmable(widths=(0.5, 1.0))")
        >>> gates(add_gate(slim))
        {'layer1.gate': SqueezeGate(widths=(0.5, 1.0))}
    """
    ratios = tuple(width for width in require_widths(model) if not isinstance(width, str))
    if len(ratios) < 2 or len(ratios) < len(widths(model)):
        raise IncompatibleModelError(
            f"{type(model).__name__} has the widths {', '.join(map(format_width, widths(model)))}: a gate needs two ratios or more, as "
            "Slimmable(widths=(0.5, 1.0)) gives"
        )
    if gates(model):
        raise IncompatibleModelError(f"{type(model).__name__} has a gate already: {', '.join(gates(model))}")
    selected = next(layer.width_index for layer in slimmable_layers(model))
    ghost = probe.on_meta(model)  # what fails, fails there
    select_width(ghost, -1)
    front = find_front(ghost, after)
    shares = _channels_after(ghost, front.after)
    _insert(ghost, front, ratios, shares)
    check_runs(ghost)
    model = copied(model, inplace=inplace)
    _insert(model, front, ratios, shares)
    select_width(model, selected)
    record(model, {"verb": "add_gate", "after": front.after})
    return model


def _insert(model: nn.Module, front: Split, ratios: tuple[float, ...], shares: tuple[int, ...]) -> None:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, WidthAware) and is_within(name, front.front):
            module.set_width_spec(None)
    body = model.get_submodule(front.after)
    replace(model, {id(body): split_point(body, front.channels[0], ratios, shares, model)})


def find_front(model: nn.Module, after: str | None = None) -> Split:
    """Where the front ends: after the first stage, or after the module of this name.

    Raises:
        ConfigError: No such module.
        IncompatibleModelError: The front cannot end there, or there is no stage.
    """
    size = probe.input_size(model)
    split = split_at(model, first_stage(model, size) if after is None else after, size)
    if len(split.cuts) > 1:
        raise IncompatibleModelError(
            f"the front cannot end at {split.after!r}: the output of {split.cuts[0]!r} bypasses it. "
            "Name a module whose output is the only input of the rest, such as the end of a stage"
        )
    return split


def split_point(
    body: nn.Module, channels: int, ratios: Sequence[float], shares: Sequence[int], network: nn.Module
) -> SplitPoint:
    """The last module of the front, with that many output channels, and a gate of the network's type and device after it.

    ``shares`` are the channels that the rest of the network reads at each width.
    """
    spec = WidthSpec(tuple(ratios), (channels,) * len(shares), tuple(shares))
    return SplitPoint(body, SqueezeGate(channels, ratios, next(network.parameters())), spec)


def _channels_after(model: nn.Module, after: str) -> tuple[int, ...]:
    """Output channels of a module at each width; ``model`` is on the meta device."""
    size, found = probe.input_size(model), []
    for index in range(len(widths(model))):
        select_width(model, index)
        found.append(next(call.output.shape[1] for call in probe.image_calls(model, size) if call.name == after))
    return tuple(found)


def check_runs(ghost: nn.Module) -> None:
    """Raise unless a network with a gate, which is on the meta device, runs at every width."""
    size = probe.input_size(ghost)
    for index, width in enumerate(widths(ghost)):
        select_width(ghost, index)
        error = probe.failure(ghost, size)
        if error is not None:
            raise IncompatibleModelError(
                f"{type(ghost).__name__} does not run at width {format_width(width)} after a front of full width: "
                f"{str(error).splitlines()[0]}. End the front elsewhere"
            )


def first_stage(model: nn.Module, size: probe.Size) -> str:
    """The default end of a front: the first module that holds several convolutions, but at most half of them.

    In a network without such stages it is the first module after a third of the convolutions.

    Raises:
        IncompatibleModelError: There is none.
    """
    ran = list(dict.fromkeys(call.name for call in probe.image_calls(model, size) if call.name))
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | GeneratedConv2d)]
    for name in ran:
        outer = name.rpartition(".")[0]
        in_outer = _count(convs, outer) if outer else len(convs)
        if 2 <= _count(convs, name) <= len(convs) / 2 < in_outer:
            return name
    seen = 0
    for name in ran:
        seen += name in convs
        if seen >= len(convs) / 3 and name not in convs:
            return name
    raise IncompatibleModelError(
        f"{type(model).__name__} has no stage that could be the front. Name the module that ends it, as gate='layer1' or after='layer1'"
    )


def _count(names: Iterable[str], outer: str) -> int:
    return sum(is_within(name, (outer,)) for name in names)
