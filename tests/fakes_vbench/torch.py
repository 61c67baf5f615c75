"""Stands in for torch where only the fake vbench runs: the real one takes seconds to import, for each dimension."""

device = str
