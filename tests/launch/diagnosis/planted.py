"""Run GRPO with a planted fault: `python tests/launch/diagnosis/planted.py NAME OVERRIDES...`."""

from __future__ import annotations

import sys


def main() -> None:
    from tests.launch.diagnosis.faults import FAULTS

    words = [word for word in sys.argv[1:] if not word.startswith("--local")]
    name = words.pop(0)
    if name != "none":
        FAULTS[name].plant()
    sys.argv = ["launch/grpo.py", *words]
    from launch.grpo import main as train

    train()


if __name__ == "__main__":
    main()
