"""Recipes that run the commands many times and compare their results."""

import sys
from pathlib import Path

# `python experiments/reproduce_rm.py` puts this folder first on sys.path, where our
# file names (`experiments/runner.py` and others) would hide other packages.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [
    entry for entry in sys.path if not entry or Path(entry).resolve() != _HERE
]
