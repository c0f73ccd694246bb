"""`thriftnet fold`: a converted network as plain layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thriftnet.cli.common import Parser, chosen_width, open_network, parse_with_kwargs
from thriftnet.cli.output import emit
from thriftnet.errors import IncompatibleModelError

if TYPE_CHECKING:
    from argparse import Namespace

    from torch import nn

    from thriftnet.core.fold import Preference
    from thriftnet.core.probe import Size

TOLERANCE = 1e-3  # of float32 outputs, relative to the largest


def run(arguments: Sequence[str]) -> None:
    shared = ("--output", "--width", "--width-index", "--input-size")
    parser = Parser("fold", "Turn a converted network into plain torch.nn layers, and save it.", "model", *shared)
    prefer = (
        "keep filter bases and low rank as two thin layers where these run faster, or store less; default: one layer each"
    )
    parser.add_argument("--prefer", choices=["speed", "size"], help=prefer)
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
    size = input_size_of(model, options.input_size)
    folded, error = checked_fold(model, size, TOLERANCE, options.prefer or "", **width)
    folder = save(folded, options.output)
    sizes = {"params_before": count_params(model), "params": count_params(folded)}
    sizes |= {"bytes_before": stored_bytes(model), "bytes": stored_bytes(folded)}
    text = f"{folder}: {sizes['params']:,} parameters in plain layers, largest relative difference {error:.1e}"
    if sizes["bytes"] > sizes["bytes_before"]:
        text += f"\n{growth(model, sizes, options)}"
    emit(text, {"output": str(folder), **sizes, "max_relative_error": error}, as_json=options.json)


def stored_bytes(model: nn.Module) -> int:
    """Of parameters and buffers as they are saved."""
    from thriftnet.core.tied import unique_tensors

    return sum(tensor.nbytes for tensor in unique_tensors(model).values())


def growth(model: nn.Module, sizes: dict[str, int], options: Namespace) -> str:
    """For a network that is larger in plain layers: its sizes, and what keeps it small."""
    from thriftnet.core.fold import fold
    from thriftnet.core.tied import count_params

    keeps = f"to stay small, keep the converted network, {options.model}"
    if not options.prefer and (smaller := count_params(fold(model, prefer="size"))) < sizes["params"]:
        keeps += f"; or give --prefer size, which stores {smaller:,} parameters in plain layers"
    return (
        f"note: it grew from {sizes['params_before']:,} to {sizes['params']:,} parameters, from {sizes['bytes_before'] / 1e6:.2f} to "
        f"{sizes['bytes'] / 1e6:.2f} MB, since a plain layer holds all of its weight: {keeps}"
    )


def checked_fold(
    model: nn.Module, size: Size, tolerance: float, prefer: Preference = "", **width: Any
) -> tuple[nn.Module, float]:
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
    folded = freeze(model, **width, prefer=prefer) if width else fold(model, prefer=prefer)
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
