"""Measure everything that docs/performance.md shows, with either allocator, and write its tables and pictures.

    python -m benchmarks.page               # about a quarter of an hour on a quiet core
    python -m benchmarks.page --only-write  # from the results of the last time

The text around the tables is written by hand: read it again when numbers have changed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
PAGE, RESULTS, IMAGES = DOCS / "performance.md", DOCS / "results", DOCS / "images"
RUNS = {
    "default": ("--svg", str(IMAGES / "performance_targets.svg"), "--floors", str(IMAGES / "performance_floors.svg")),
    "fast-malloc": ("--fast-malloc",),
    "sweep": ("--sweep", "--svg", str(IMAGES / "performance_sweep.svg")),
}
Rows = dict[tuple[str, str], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only-write", action="store_true", help="take the results of the last time")
    if not parser.parse_args().only_write:
        for name, options in RUNS.items():
            measure(name, options)
    results = {name: json.loads(latest(name).read_text(encoding="utf-8")) for name in RUNS}
    page = PAGE.read_text(encoding="utf-8")
    for block, text in blocks(results).items():
        page = filled(page, block, text)
    PAGE.write_text(page, encoding="utf-8")


def measure(name: str, options: tuple[str, ...]) -> None:
    """One run of all topics in a process of its own; its results replace those of the last time."""
    print(f"measuring: {name}", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *options, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    written = json.dumps(json.loads(done.stdout.splitlines()[-1]), indent=1) + "\n"
    for old in RESULTS.glob(f"*-cpu-{name}.json"):
        old.unlink()
    (RESULTS / f"{date.today()}-cpu-{name}.json").write_text(written, encoding="utf-8")


def latest(name: str) -> Path:
    """The results of a run."""
    return max(RESULTS.glob(f"*-cpu-{name}.json"))


def blocks(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What goes between the page's marks."""
    plain, fast = ({(row["case"], row["what"]): row for row in results[name]["rows"]} for name in ("default", "fast-malloc"))
    aimed = {key for rows in (plain, fast) for key, row in rows.items() if row["target"]}
    conditions = results["default"]["conditions"]
    links = {name: f"results/{latest(name).name}" for name in RUNS}
    return {
        "conditions": (
            f"{conditions['machine']}, torch {conditions['torch']}, {conditions['threads']} thread, {latest('default').name[:10]}; "
            f"the numbers: [default allocator]({links['default']}), [`--fast-malloc`]({links['fast-malloc']}), "
            f"[by size]({links['sweep']})"
        ),
        "targets": table(plain, fast, [key for key in plain | fast if key in aimed]),
        "others": table(plain, fast, [key for key in plain | fast if key not in aimed]),
    }


def table(plain: Rows, fast: Rows, keys: list[tuple[str, str]]) -> str:
    """Ratios with either allocator."""
    targets = any((plain.get(key) or fast[key])["target"] for key in keys)
    head = ["id", "case", "ratio", "target"] if targets else ["case", "ratio"]
    lines = [[*head, "default malloc", "`--fast-malloc`"], ["---"] * (len(head) + 2)]
    for key in keys:
        first, second = plain.get(key), fast.get(key)
        cells = [*key, cell(first), cell(second)]
        lines.append([name_of(first, second), *key, bound(first, second), *cells[2:]] if targets else cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def name_of(first: dict[str, Any] | None, second: dict[str, Any] | None) -> str:
    """The target's name."""
    return next(row["target"]["id"] for row in (first, second) if row and row["target"])


def bound(first: dict[str, Any] | None, second: dict[str, Any] | None) -> str:
    """What the ratio should be; both where it depends on the allocator."""
    found = [
        f"{'>=' if row['target']['kind'] == 'at least' else '<='} {row['target']['bound']:g}"
        if row and row["target"]
        else ""
        for row in (first, second)
    ]
    if found[0] == found[1] or not found[1]:
        return found[0]
    return f"{found[0]}; with `--fast-malloc` {found[1]}" if found[0] else f"with `--fast-malloc` {found[1]}"


def cell(row: dict[str, Any] | None) -> str:
    """A ratio with its quartiles."""
    if row is None:
        return ""
    spread = "" if row["low"] == row["high"] else f" ({row['low']:.3g} to {row['high']:.3g})"
    return f"{row['value']:.3g}{spread}" + (" **missed**" if row["verdict"] == "MISSED" else "")


def filled(page: str, block: str, text: str) -> str:
    """The page with another text between the marks of a block."""
    pattern = re.compile(rf"(<!-- {block} -->\n).*?(\n<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{PAGE} has no marks <!-- {block} --> ... <!-- end -->")
    return pattern.sub(lambda found: found[1] + text + found[2], page)


if __name__ == "__main__":
    main()
