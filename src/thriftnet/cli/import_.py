"""`thriftnet import`: a checkpoint of one of the original projects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thriftnet.cli.common import Parser, parse_with_kwargs, unknown_option
from thriftnet.cli.output import emit

BOOLEANS = {"true": True, "false": False}
HINTS_HELP = (
    "Further --key value options are hints where tensors and file leave a choice: --mapping strided, --activation gelu, "
    "--strides 1,2,2, --ema false, --system weight-sharing, --model resnet20 for a network of the zoo under its own keys."
)


def known_hints() -> set[str]:
    """Hints of all systems."""
    from thriftnet.importing.systems import known_hints

    return set(known_hints())


def run(arguments: Sequence[str]) -> None:
    parser = Parser("import", "Import a checkpoint of one of the five original projects, or a plain ResNet's.")
    parser.epilog = HINTS_HELP
    parser.further = known_hints
    parser.add_argument(
        "file", metavar="FILE", help="a file of torch.save, old or new, or safetensors; its name does not matter"
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", help="where to save the network as a model folder")
    options, hints = parse_with_kwargs(parser, arguments)
    hints = {name: BOOLEANS.get(str(value).lower(), value) for name, value in hints.items()}

    from thriftnet.core.tied import count_params
    from thriftnet.importing.importer import folder_facts, import_checkpoint
    from thriftnet.models.table import IDENTITY
    from thriftnet.store.model_file import save

    for name in hints if "model" not in hints else ():
        if name not in known_hints():
            raise unknown_option(name, parser.known, known_hints())
    imported = import_checkpoint(options.file, **hints)
    identity = getattr(imported.model, IDENTITY, None) or {}
    folder = save(imported.model, options.output, metadata=folder_facts(imported)) if options.output else None
    result: dict[str, Any] = {
        **vars(imported.source),  # file, system and format
        "model": identity.get("name"),
        "kwargs": dict(identity.get("kwargs", {})),
        "params": count_params(imported.model),
        "preprocessing": dict(imported.preprocessing),
        "metadata": dict(imported.metadata),
        "notes": list(imported.notes),
        "output": None if folder is None else str(folder),
    }
    emit(str(imported) if folder is None else f"{imported}\nsaved   {folder}", result, as_json=options.json)
