"""``python -m compat [NETWORK ...] [--technique T ...] [--quick] [--cells FILE] [--page FILE]``."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

from compat import networks, odd
from compat.cell import VERDICTS, Cell
from compat.page import summary, write_page
from compat.runner import Cells, Configs, run_all
from compat.sample import Sample
from thriftnet.core.spec import parse_spec
from thriftnet.techniques import TECHNIQUES

QUICK = ("timm:lcnet_035",)  # a small one for the test suite
EVERY_ODD = 9  # and of the odd modules, every ninth


def main(argv: list[str] | None = None) -> int:
    """Try and print; returns 1 if anything was wrong or crashed."""
    options = parse(argv)
    chosen = select(options)
    if options.list:
        print("\n".join(sample.name for sample in chosen))
        return 0
    torch.set_num_threads(1)
    import timm  # noqa: F401  # once, before processes are forked
    import torchvision  # noqa: F401

    configs = configs_of(options.technique)
    if options.fresh and options.cells:
        options.cells.unlink(missing_ok=True)
    cells = Cells(options.cells, keep=options.keep)
    if not options.only_page:
        run_all(chosen, configs, cells, processes=options.processes, limit=options.limit, told=tell)
    print(summary(list(cells.done.values()), configs))
    if options.page:
        write_page(options.page, cells.done, configs)
    return int(any(cell.verdict in VERDICTS[3:] for cell in cells.done.values()))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m compat", description="Try every technique on many networks, and on odd ones."
    )
    parser.add_argument("network", nargs="*", help="regular expressions that names have (default: all)")
    parser.add_argument("--technique", nargs="*", help="names or configs (default: all of the registry, as they are)")
    parser.add_argument("--quick", action="store_true", help="a sample for the test suite")
    parser.add_argument("--list", action="store_true", help="only list the networks")
    parser.add_argument("--cells", type=Path, help="keep results here, and go on with those that are there")
    parser.add_argument("--fresh", action="store_true", help="try again what is there")
    parser.add_argument("--keep", action="store_true", help="go on even if the source has changed since")
    parser.add_argument("--only-page", action="store_true", help="try nothing, only write")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the results between the markers of this page")
    parser.add_argument("--processes", type=int, default=2, help="networks at a time")
    parser.add_argument(
        "--limit", type=float, default=120.0, metavar="SECONDS", help="of processor time, for one network and technique"
    )
    parser.add_argument("--choose", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.choose:
        networks.choose()
        parser.exit()
    if options.page and (options.quick or options.network or options.technique):
        parser.error("--page takes the whole table: leave out --quick, NETWORK and --technique")
    return options


def select(options: argparse.Namespace) -> list[Sample]:
    """The networks that are asked for."""
    found = [*odd.samples(), *networks.samples()]
    if options.quick:
        quick = {sample.name: sample for sample in found}
        found = [*(quick[name] for name in QUICK if name in quick), *odd.samples()[::EVERY_ODD]]
    return [sample for sample in found if not options.network or any(re.search(p, sample.name) for p in options.network)]


def configs_of(named: list[str] | None) -> Configs:
    """Configs by the names of their techniques: as given, or every technique's default."""
    return {text.partition("(")[0]: parse_spec(text, TECHNIQUES) for text in named or TECHNIQUES}


def tell(cell: Cell) -> None:
    saved = f" {100 - 100 * cell.after / max(1, cell.before):.0f}% saved" if cell.verdict == "exact" else ""
    why = "" if cell.verdict == "exact" else f" [{cell.step}] {cell.reason[:240]}"
    print(f"{cell.network} x {cell.technique}: {cell.verdict}{saved}{why} ({cell.seconds:.1f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
