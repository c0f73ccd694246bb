"""`thriftnet fold`: a converted network as plain layers."""

from __future__ import annotations

from collections.abc import Sequence

from thriftnet.cli.common import emit, input_size, literal, new_parser, open_network, parse_with_kwargs
from thriftnet.errors import IncompatibleModelError

TOLERANCE = 1e-3  # of float32 outputs, relative to the largest


def run(arguments: Sequence[str]) -> None:
    parser = new_parser("fold", "Turn a converted network into plain torch.nn layers, and save it.", takes_model=True)
    parser.add_argument("--output", metavar="FOLDER", required=True, help="where to save the plain network")
    parser.add_argument("--width", help="of a slimmable network: 0.5, a position, smallest or largest")
    parser.add_argument("--input-size", metavar="C,H,W", help="for the check; left out, what the network was made for")
    options, kwargs = parse_with_kwargs(parser, arguments)

    from thriftnet.core.fold import fold, freeze, is_foldable
    from thriftnet.core.tied import count_params
    from thriftnet.core.width import set_width
    from thriftnet.measure.difference import relative_difference
    from thriftnet.store.model_file import save

    model = open_network(options.model, kwargs).eval()
    if not any(is_foldable(module) for module in model.modules()):
        raise IncompatibleModelError(
            f"{options.model} has plain layers only: there is nothing to fold. See thriftnet convert"
        )
    size = input_size(options.input_size, model)
    if options.width is None:
        folded = fold(model)
    else:
        width = literal(options.width)
        folded = freeze(model, width)
        set_width(model, width)
    error = relative_difference(model, folded, size)
    if not error <= TOLERANCE:
        raise IncompatibleModelError(f"the plain network differs by {error:.1e} of the largest output: nothing was saved")
    folder = save(folded, options.output)
    result = {"output": str(folder), "params": count_params(folded), "max_relative_error": error}
    text = f"{folder}: {count_params(folded):,} parameters in plain layers, largest relative difference {error:.1e}"
    emit(text, result, as_json=options.json)
