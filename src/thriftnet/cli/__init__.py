"""The command line: one file per verb. Help is printed without importing torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from thriftnet import __version__
from thriftnet.errors import ThriftnetError, unknown_name

VERBS = {
    "demo": "train a small network on digits, convert it with each technique, fold and compare; writes report.html",
    "models": "list the networks of the zoo",
    "count": "count the parameters, multiply-accumulates (MACs) and bytes moved of a network",
    "plan": "show what a conversion would do, layer by layer",
    "convert": "convert a network with a technique, and save it",
    "train": "train a network by a recipe, on one process or many; the same command resumes",
    "evaluate": "measure the accuracy of a network on a data set",
    "recipes": "list the training recipes, or show one",
    "import": "import a checkpoint of one of the five original projects",
    "bench": "time a network as it is, converted, folded, packed and compiled",
    "recalibrate": "estimate batch-norm statistics again from training images, at every width",
    "search": "find the best widths of a trained slimmable network within a budget of MACs; saves a plain network",
    "similarity": "show which layers of a network with soft sharing have learned the same, and tie them",
    "fold": "turn a converted network into plain layers, check that the outputs are equal, and save it",
}
MODULES = {"import": "import_"}  # a verb that is a keyword of Python


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0 done, 2 wrong use or a refused input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(help_text())
        return 0
    if arguments[0] == "--version":
        sys.stdout.write(f"thriftnet {__version__}\n")
        return 0
    verb, rest = arguments[0], arguments[1:]
    try:
        if verb not in VERBS:
            raise unknown_name("verb", verb, VERBS)
        importlib.import_module(f"thriftnet.cli.{MODULES.get(verb, verb)}").run(rest)
    except ThriftnetError as error:
        sys.stderr.write(f"thriftnet{f' {verb}' if verb in VERBS else ''}: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"thriftnet {verb}: {interrupt or 'stopped'}\n")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return 0


def help_text() -> str:
    """The text of `thriftnet --help`."""
    verbs = "\n".join(f"  {verb:<11} {text}" for verb, text in VERBS.items())
    return (
        "usage: thriftnet VERB [options]        (options: thriftnet VERB --help)\n\n"
        f"Make ConvNets small: five papers' techniques, and low rank, for any PyTorch network.\n\n{verbs}\n\n"
        "Every verb that prints a result takes --json.\n"
    )
