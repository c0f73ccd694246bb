"""Back to plain layers that compute the same: for good, at one width, or while a block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, Protocol, cast

from torch import nn

from thriftnet.arguments import InputSize, checked
from thriftnet.core import probe
from thriftnet.core.copied import copied
from thriftnet.core.fold_norms import fold_norms as fold_norms_of
from thriftnet.core.history import HISTORY, history, record
from thriftnet.core.kept import keep_attributes
from thriftnet.core.module import ThriftyModule
from thriftnet.core.sites import replace, restoring, sites
from thriftnet.core.width import eval_mode, require_widths, select_width, widths
from thriftnet.core.width import width as selected_width
from thriftnet.core.width_slots import IndexChoice, WidthChoice, assign, width_indices
from thriftnet.errors import IncompatibleModelError

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class Foldable(Protocol):
    """A layer that can be folded into plain ones."""

    training: bool

    def fold(self) -> nn.Module:
        """Layers that compute the same; those that are foldable themselves are folded in turn, tied ones once."""
        ...


def is_foldable(module: nn.Module) -> TypeIs[Foldable]:  # type: ignore[narrowed-type-not-subtype]
    """Whether the module can be folded into plain layers."""
    return isinstance(module, ThriftyModule) and callable(getattr(module, "fold", None))


Preference = Literal["", "speed", "size"]


@checked
def fold(model: nn.Module, *, inplace: bool = False, prefer: Preference = "") -> nn.Module:
    """The same function in `torch.nn` layers only, at the selected width.

    Tied layers stay tied. A network without converted layers is returned unchanged.

    Args:
        model: The network, in eval mode.
        inplace: Replace the layers in ``model`` itself.
        prefer: "" makes one layer of every converted one. With "speed" or "size" a layer that runs faster, or stores
            less, as two plain layers becomes those: a filter basis of a low rank.

    Raises:
        ConfigError: Another preference.
        IncompatibleModelError: A converted layer is in training mode, where the function depends on the batch.
    """
    for name, module in model.named_modules():
        if is_foldable(module) and module.training:
            raise IncompatibleModelError(
                f"layer {name!r} is in training mode; folding is exact in eval mode only. Call model.eval() first"
            )
    plain = copied(model, inplace=inplace)
    selected = {"width": selected_width(plain)} if widths(plain) else {}
    folded: set[int] = set()
    while found := sites(plain, lambda _, module: is_foldable(module) and id(module) not in folded):
        table = {id(site.module): _folded(cast(Foldable, site.module), prefer) for site in found}
        keep_attributes([(site.module, table[id(site.module)]) for site in found])
        folded.update(id(layer) for layer in table.values())
        plain = replace(plain, table)
    record(plain, {"verb": "fold", **({"prefer": prefer} if prefer else {}), **selected})
    return plain


def _folded(layer: Foldable, prefer: str) -> nn.Module:
    """The folded layer; a layer with several forms chooses in ``fold_for(prefer)``."""
    choose = getattr(layer, "fold_for", None)
    return layer.fold() if choose is None else cast(nn.Module, choose(prefer))


@checked
def freeze(
    model: nn.Module,
    width: WidthChoice | None = None,
    *,
    index: IndexChoice | None = None,
    fold_norms: bool = False,
    input_size: InputSize | None = None,
    prefer: Preference = "",
) -> nn.Module:
    """A plain network, in eval mode, that equals ``model`` at one of its widths. Its weights are copies.

    Args:
        model: A slimmable network.
        width: One width for all of it, as `set_width` takes it; or a sequence with a width for each part that can have its own; or
            widths by regular expressions on the names of layers, where the first match counts and other layers stay at the
            largest.
        index: The same as indices into the network's list of sub-networks.
        fold_norms: Fold batch norms into the convolutions before them, where nothing else reads those.
        input_size: Channels, height and width of an image, used to find which layers need the same width. Default: the size the
            network states, or one it runs on.
        prefer: As in `fold`.

    Raises:
        IncompatibleModelError: The network has one width only, or a layer cannot have a width of its own.
        ConfigError: It has no such width, or the widths do not fit together.
    """
    if not widths(model) and any(step["verb"] == "freeze" for step in history(model)):
        raise IncompatibleModelError(
            f"{type(model).__name__} has one width only, since it was frozen. Freeze the network that it was taken from"
        )
    chosen = width_indices(require_widths(model), width, index)
    size = probe.input_size(model, input_size) if fold_norms or not isinstance(chosen, int) else None
    model = copied(model).eval()
    if isinstance(chosen, int):
        select_width(model, chosen)
    else:
        assign(model, chosen, cast(probe.Size, size))
    frozen = fold(model, inplace=True, prefer=prefer)
    if fold_norms:
        frozen = fold_norms_of(frozen, lambda ghost: probe.run(ghost, cast(probe.Size, size)))
    options = {
        "width": width,
        "index": index,
        "fold_norms": fold_norms or None,
        "input_size": input_size,
        "prefer": prefer or None,
    }
    given = {name: _plain(value) for name, value in options.items() if value is not None}
    setattr(frozen, HISTORY, [*history(frozen)[:-1], {"verb": "freeze", **given}])
    return frozen


def _plain(value: object) -> object:
    """A choice of widths as JSON holds it."""
    if isinstance(value, Mapping):
        return dict(value)
    return value if isinstance(value, str) or not isinstance(value, Sequence) else list(value)


@checked
@contextmanager
def eval_fold(model: nn.Module, *, prefer: Preference = "") -> Iterator[nn.Module]:
    """The network in eval mode with folded layers within the block; afterwards as before, training mode included.

    The block receives the network to run. Without converted layers it is only switched to eval mode. Changes to parameters
    within the block do not reach the folded layers, and hooks of converted layers do not run.

    Args:
        model: Any network. Its own layers are swapped, so that it must not be trained by another thread meanwhile.
        prefer: As in `fold`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
        >>> with eval_fold(model) as folded:
        ...     folded.training
        False
        >>> model.training
        True
    """
    restore = restoring(model)
    past = history(model)
    with eval_mode(model):
        try:
            yield fold(model, inplace=True, prefer=prefer)
        finally:
            restore()
            if past:
                setattr(model, HISTORY, past)
            elif hasattr(model, HISTORY):
                delattr(model, HISTORY)
