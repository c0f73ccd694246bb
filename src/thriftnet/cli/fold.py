"""`thriftnet fold`: a converted network as plain layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thriftnet.cli.common import Parser, chosen_width, open_network, parse_with_kwargs
from thriftnet.cli.output import emit
from thriftnet.errors import IncompatibleModelError

if TYPE_CHECKING:
    from torch import nn

    from thriftnet.core.probe import Size

TOLERANCE = 1e-3  # of float32 outputs, relative to the largest


def run(arguments: Sequence[str]) -> None:
    shared = ("--output", "--width", "--width-index", "--input-size")
    parser = Parser("fold", "Turn a converted network into plain torch.nn layers, and save it.", "model", *shared)
    options, kwargs = parse_with_kwargs(parser, arguments)
    width = chosen_width(options)

    from thriftnet.core.fold import is_foldable
    from thriftnet.core.provenance import input_size_of
    from thriftnet.core.tied import count_params
    from thriftnet.store.model_file import save

    model = open_network(options.model, kwargs).eval()
    if not any(is_foldable(module) for module in model.modules()):
        raise IncompatibleModelError(
            f"{options.model} has plain layers only: there is nothing to fold. See thriftnet convert"
        )
    folded, error = checked_fold(model, input_size_of(model, options.input_size), TOLERANCE, **width)
    folder = save(folded, options.output)
    result = {"output": str(folder), "params": count_params(folded), "max_relative_error": error}
    text = f"{folder}: {count_params(folded):,} parameters in plain layers, largest relative difference {error:.1e}"
    emit(text, result, as_json=options.json)


def checked_fold(model: nn.Module, size: Size, tolerance: float, **width: Any) -> tuple[nn.Module, float]:
    """The network in plain layers, at ``width`` if given, and the largest difference of outputs, relative to the largest.

    Raises:
        IncompatibleModelError: They differ by more than the tolerance.
    """
    import torch

    from thriftnet.core.fold import fold, freeze
    from thriftnet.core.norm import first_tensor
    from thriftnet.core.width import set_width

    if width:
        set_width(model, **width)
    folded = freeze(model, **width) if width else fold(model)
    images = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    like = first_tensor(model)
    images = images if like is None else images.to(like)
    with torch.no_grad():
        expected, got = model(images), folded(images)
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    error = float((expected - got).abs().max() / scale)
    if not error <= tolerance:
        raise IncompatibleModelError(f"the plain network differs by {error:.1e} of the largest output: it was not saved")
    return folded, error
