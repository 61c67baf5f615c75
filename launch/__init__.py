"""The commands people type."""

import sys
from pathlib import Path

# `python launch/grpo.py` puts this folder first on sys.path, where our file names would
# hide other packages: a user's reward with `import evaluate` would get launch/evaluate.py.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [
    entry for entry in sys.path if not entry or Path(entry).resolve() != _HERE
]
