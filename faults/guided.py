"""Files that atheris makes, led by which lines of the importers they reach.

``python -m faults.guided CORPUS RESULTS ...`` is the process that does it; libFuzzer ends it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from faults import ROOT

if TYPE_CHECKING:
    from faults.samples import Sample
    from faults.watch import Judgement

LARGEST = 30_000  # bytes of a file
MISSING = "atheris is not installed for this Python (`.venv/bin/pip install atheris`), so no files were guided by coverage."


def judgements(samples: list[Sample], folder: Path, seed: int, runs: int) -> tuple[Iterator[Judgement], str]:
    """What became of the files that it made, and a note where it cannot make any."""
    from faults.watch import LONGEST, Judgement

    if importlib.util.find_spec("atheris") is None:
        return iter(()), MISSING
    corpus, results = folder / "corpus", folder / "results"
    corpus.mkdir()
    for index, sample in enumerate(samples):
        if sample.part is None and len(sample.data) <= LARGEST:
            (corpus / str(index)).write_bytes(sample.data)
    started = len(list(corpus.iterdir()))
    limits = [f"-runs={runs}", f"-seed={seed + 1}", f"-max_len={LARGEST}", f"-timeout={LONGEST}", "-rss_limit_mb=4096"]
    command = [sys.executable, "-m", "faults.guided", str(results), str(corpus), *limits, f"-artifact_prefix={folder}/"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found = [Judgement(**json.loads(line)) for line in results.read_text().splitlines()] if results.exists() else []
    if done.returncode or len(found) < runs:
        last = " ".join(done.stderr[-300:].split())
        found.append(Judgement("?", "FAILED", f"atheris ended with {done.returncode} after {len(found)} files: {last}"))
    version = importlib.metadata.version("atheris")
    return iter(found), f"atheris {version} started from {started} files of at most {LARGEST:,} bytes."


def fuzz(results: Path, arguments: list[str]) -> None:
    """Judge what atheris makes; does not return."""
    import atheris

    with atheris.instrument_imports(include=["thriftnet.importing"]):
        import thriftnet.importing.importer
    import torch

    from faults.samples import Sample
    from faults.watch import in_this_process, judge, return_memory

    return_memory()
    torch.set_num_threads(1)
    folder = results.parent / "work"
    folder.mkdir()
    in_this_process().__enter__()  # where atheris sees which lines are reached; this process ends with it
    for sound in sorted(Path(arguments[0]).iterdir()):
        thriftnet.importing.importer.import_checkpoint(sound)  # whatever is loaded on first use is there now
    empty = Sample("made by atheris", "torch and safetensors", b"")
    file = results.open("w", buffering=1)

    def one(data: bytes) -> None:
        file.write(json.dumps(asdict(judge(empty, data, folder, None, alarm=False))) + "\n")

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


if __name__ == "__main__":
    fuzz(Path(sys.argv[1]), sys.argv[2:])
