"""Loading builds networks of shapes only: that needs neither torch's compiler nor SymPy, which take seconds to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import thriftnet as tn

SPECS = ("soft-sharing(templates=4)", "filter-basis(shared_rank=16)", "shift()", "weight-sharing(rate=2)")
CODE = """
import sys, thriftnet as tn
for folder in sys.argv[1:]:
    tn.load(folder)
    print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""


def test_loading_imports_no_compiler(tmp_path: Path) -> None:
    folders = []
    for spec in SPECS:
        converted = tn.convert(tn.create_model("resnet20"), spec).eval()
        folders += [tn.save(converted, tmp_path / spec), tn.save(tn.fold(converted), tmp_path / f"{spec}, folded")]
    done = subprocess.run([sys.executable, "-c", CODE, *map(str, folders)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]"] * len(folders)
