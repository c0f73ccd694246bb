"""A seventh technique is one file and one line: the toy of CONTRIBUTING.md, put into a copy of the source, keeps every law."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import thriftnet

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILE, USE = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
(LINE,) = re.findall(r'^    ("filter-mix": .*,)$', GUIDE, re.MULTILINE)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source with one more file and one more line."""
    source = tmp_path_factory.mktemp("sixth")
    shutil.copytree(Path(thriftnet.__file__).parent, source / "thriftnet", ignore=shutil.ignore_patterns("__pycache__"))
    place = re.match(r"# src/(\S+)\n", FILE)
    assert place is not None
    (source / place[1]).write_text(FILE, encoding="utf-8")
    table = source / "thriftnet" / "techniques" / "__init__.py"
    start = "TECHNIQUES = Registry(\n    {\n"
    text = table.read_text(encoding="utf-8")
    assert start in text
    table.write_text(text.replace(start, f"{start}        {LINE}\n"), encoding="utf-8")
    return source


def run(source: Path, *command: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_law_holds(source: Path) -> None:
    """The very tests of the other six: those whose names contain the new one's."""
    arguments = ["tests/test_laws.py", "-k", "filter-mix or test_15", *["-n", "0", "-q", "-rA", "-p", "no:cacheprovider"]]
    passed = re.findall(r"^PASSED tests/test_laws.py::(\S+)", run(source, "-m", "pytest", *arguments), re.MULTILINE)
    laws = {int(law) for law in re.findall(r"test_(\d\d)_", "\n".join(passed))}
    assert laws == {*range(1, 17)}
    assert any(name.startswith("test_02_full_capacity[filter-mix") for name in passed)
    pairs = [name for name in passed if name.startswith("test_12_pairs[")]
    assert len(pairs) == 2 * 2 * len(thriftnet.TECHNIQUES)  # before and after each of the others, on two networks


def test_it_is_public_and_has_a_text_form(source: Path) -> None:
    check = """
import sys
import thriftnet as tn
assert "FilterMix" in dir(tn) and "FilterMixConv2d" in tn.__all__ and "torch" not in sys.modules
assert tn.FilterMix.__module__ == "thriftnet.techniques.filter_mix"
model = tn.create_model("resnet20")
assert tn.plan(model, "filter-mix()").technique == tn.FilterMix()
try:
    tn.convert(model, "filter-mx")
except tn.ConfigError as error:
    assert "did you mean 'filter-mix'" in str(error), error
else:
    raise AssertionError("an unknown name was taken")
from thriftnet.cli.demo import shown
assert "filter-mix" in shown()
"""
    run(source, "-c", check + USE)
