"""How thriftnet behaves when things go wrong: kills, full disks, damaged and hostile files, several writers.

``python -m faults`` (or ``make faults``) measures it, one file here per figure, and keeps the results in docs/reliability.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))  # payloads, mutations and small networks are the tests' own
