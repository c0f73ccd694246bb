"""The command line: one file per verb. Help is printed without importing torch."""

from __future__ import annotations

import errno
import importlib
import sys
import warnings
from collections.abc import Sequence

from thriftnet import __version__
from thriftnet.cli.output import UnprintedError, print_out, say
from thriftnet.errors import ThriftnetError, unknown_name
from thriftnet.text import one_line

VERBS = {
    "demo": "train a small network on digits, convert it with each technique, fold and compare; writes report.html",
    "models": "list the networks of the zoo",
    "count": "count the parameters, multiply-accumulates (MACs) and bytes moved of a network",
    "plan": "show what a conversion would do, layer by layer",
    "suggest": "compare what all techniques would do within a budget",
    "convert": "convert a network with a technique, and save it",
    "compress": "make a trained network small and win back its accuracy: choose, fit, train, fold and report",
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


DONE, FAILED, REFUSED, FAULT, INTERRUPTED = 0, 1, 2, 70, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    It is 0 when done, 1 when the system stopped it (no memory, a full disk, a closed output), 2 for wrong use or a refused input,
    70 after a fault of thriftnet, and 130 when interrupted. Whatever happens is said in one line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = f"thriftnet {arguments[0]}" if arguments and arguments[0] in VERBS else "thriftnet"
    shown, warnings.formatwarning = warnings.formatwarning, lambda message, *_: f"{name}: {one_line(str(message))}\n"
    try:
        _run(arguments)
    except ThriftnetError as error:
        from thriftnet.cli.common import did_you_mean

        say(f"{name}: {error}{did_you_mean(error)}")
        return REFUSED
    except KeyboardInterrupt as interrupt:
        say(f"{name}: {one_line(str(interrupt)) or stopped(arguments)}")
        return INTERRUPTED
    except UnprintedError as error:
        if str(error):
            say(f"{name}: cannot print the result: {error}")
        return FAILED
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            say(f"{name}: {one_line(f'{error.strerror}: {error.filename}')}")
            return REFUSED
        from thriftnet.cli.fault import describe

        system, reason = describe(arguments, error)
        say(f"{name}: {one_line(reason)}")
        return FAILED if system else FAULT
    finally:
        warnings.formatwarning = shown
    return DONE


def _run(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print_out(help_text())
        return
    verb, *rest = arguments
    if verb == "--version":
        print_out(f"thriftnet {__version__}\n")
        return
    if verb not in VERBS:
        raise unknown_name("verb", verb, VERBS)
    importlib.import_module(f"thriftnet.cli.{MODULES.get(verb, verb)}").run(rest)


def stopped(arguments: Sequence[str]) -> str:
    """What a Ctrl-C at any time leaves, and how to go on."""
    if arguments[:1] == ["train"]:
        return "stopped: the run folder is as the last checkpoint or epoch left it, and the same command resumes"
    return "stopped: every file is as it was or whole, and the same command starts over"


def help_text() -> str:
    """The text of `thriftnet --help`."""
    verbs = "\n".join(f"  {verb:<11} {text}" for verb, text in VERBS.items())
    return (
        "usage: thriftnet VERB [options]        (options: thriftnet VERB --help)\n\n"
        f"Make ConvNets small: five papers' techniques, and low rank, for any PyTorch network.\n\n{verbs}\n\n"
        "Every verb that prints a result takes --json.\n"
    )
