"""Run GRPO with a planted fault: `python tests/launch/diagnosis/planted.py NAME OVERRIDES...`.

With --serve, each line of stdin is a JSON list of a log file, a fault's name and overrides. Each
run is a fork of a process that has imported the heavy packages already, and its exit code is a
line of stdout.
"""

from __future__ import annotations

import json
import os
import sys
import traceback


def main() -> None:
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        words = [word for word in sys.argv[1:] if not word.startswith("--local")]
        run(*words)


def run(name: str, *words: str) -> None:
    """Plant a fault and train; "none" plants nothing."""
    from tests.launch.diagnosis.faults import FAULTS

    if name != "none":
        FAULTS[name].plant()
    sys.argv = ["launch/grpo.py", *words]
    from launch.grpo import main as train

    train()


def serve() -> None:
    # Other people's packages only: faults are planted before the project's own modules are loaded.
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    from diffusers import WanPipeline  # noqa: F401
    from transformers import AutoTokenizer, UMT5EncoderModel  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        log, name, *words = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_in_child(log, name, words))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _in_child(log: str, name: str, words: list[str]) -> int:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 0
    try:
        run(name, *words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except Exception:  # noqa: BLE001 - the log has it
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    main()
