"""A network made ready to run on a CPU by eager torch: everything that can be computed before is.

Batch norms go into the convolutions before them, activations run within the convolution they follow or overwrite what nothing else
reads, and weights lie as oneDNN's kernels read them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from thriftnet.arguments import InputSize, checked
from thriftnet.core import probe
from thriftnet.core.copied import copied
from thriftnet.core.fold import fold, is_foldable
from thriftnet.core.fold_norms import ACTIVATIONS, fold_norms, make_inplace, sole_readers
from thriftnet.core.history import HISTORY, history
from thriftnet.core.sites import replace
from thriftnet.errors import IncompatibleModelError
from thriftnet.kernels.packed import PackedConv2d, activation_of, can_pack, has_hooks


@checked
def pack(model: nn.Module, *, input_size: InputSize | None = None) -> nn.Module:
    """A copy of a trained network for inference on a CPU: folded, norms merged, activations and convolutions in one pass.

    It computes what ``model`` does, to rounding, at its selected width. It is a network of `torch.nn` layers to torch's
    compiler and exporters, on a GPU and with gradients; only there its convolutions run as usual. It can be saved, but
    no longer converted. Weights lie twice in memory once it has run: as they are saved, and as they are read.

    Args:
        model: The network, in eval mode.
        input_size: Channels, height and width of an image, used to find which layers follow each other. Default: the size the network
            states, or one it runs on.

    Raises:
        IncompatibleModelError: The network is in training mode, where the function depends on the batch.

    Example:
        >>> import torch
        >>> from thriftnet.models import create_model
        >>> model = create_model("resnet20").eval()
        >>> packed = pack(model)
        >>> with torch.no_grad():
        ...     torch.allclose(packed(torch.ones(1, 3, 32, 32)), model(torch.ones(1, 3, 32, 32)), atol=1e-5)
        True
    """
    if model.training:
        raise IncompatibleModelError(
            f"{type(model).__name__} is in training mode, where norms depend on the batch. Call model.eval() first"
        )
    size = probe.input_size(model, input_size)
    plain = copied(model)
    if any(is_foldable(module) for module in plain.modules()):
        plain = fold(plain, inplace=True)
    past = history(plain)
    run = partial(probe.run, size=size)
    packed = pack_layers(fold_norms(plain, run), run)
    setattr(packed, HISTORY, [*past, {"verb": "pack", "input_size": list(size)}])
    return packed


def pack_layers(model: nn.Module, run: Callable[[nn.Module], object]) -> nn.Module:
    """Pack the convolutions of ``model``, changed in place, and let activations run within them or overwrite their input.

    Args:
        model: A network of plain layers that no gradient is taken of.
        run: Runs a copy of it on the meta device once.
    """
    packable = _packable(model, run)
    within = _absorbed(model, run, set(packable))
    table: dict[int, nn.Module] = {
        id(model.get_submodule(name)): nn.Identity() for names in within.values() for name in names
    }
    for name, conv in packable.items():
        table[id(conv)] = PackedConv2d(conv, model.get_submodule(within[name][0]) if name in within else None)
    packed = replace(model, table)
    make_inplace(packed, run)
    return packed


def _packable(model: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, nn.Conv2d]:
    """Convolutions that pay off, by name: on maps of a single value, as in channel attention, there is too little to do."""
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and can_pack(module)}
    ran = [call for call in probe.calls(model, run) if call.name in convs]
    large = {call.name for call in ran if call.inputs[0].shape[2:].numel() > 1}
    return {name: conv for name, conv in convs.items() if name in large}


def _absorbed(model: nn.Module, run: Callable[[nn.Module], object], packable: set[str]) -> dict[str, list[str]]:
    """Convolutions that can take over the activations after them, with those.

    Every output of such a convolution goes to an activation of one kind, and such an activation reads nothing else.
    """
    readers, ran = sole_readers(model, run, (*ACTIVATIONS, nn.GELU))
    watched = {name for name in readers if has_hooks(model.get_submodule(name))}
    readers = {name: makers for name, makers in readers.items() if name not in watched}
    kinds = {name: activation_of(model.get_submodule(name)) for name in readers}
    while True:
        after: dict[str, list[str]] = {}
        for name, makers in readers.items():
            for maker in makers:
                after.setdefault(maker, []).append(name)
        fit = {
            maker
            for maker, names in after.items()
            if len(names) == ran[maker] and len({kinds[name] for name in names}) == 1 and maker in packable
        }
        kept = {name: makers for name, makers in readers.items() if fit.issuperset(makers) and kinds[name] is not None}
        if len(kept) == len(readers):
            return after
        readers = kept
