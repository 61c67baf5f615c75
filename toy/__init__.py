"""The embedded world: a renderer, its oracle and the tiny models trained on it."""

import sys
from pathlib import Path

# `python toy/build.py` puts this folder first on sys.path, where our file names would
# hide other packages: `toy/training.py` and others.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [
    entry for entry in sys.path if not entry or Path(entry).resolve() != _HERE
]
