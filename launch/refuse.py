"""How an entry point ends when the user can mend what is wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn


def check_new_folder(path: Path) -> None:
    """ValueError unless there is nothing, or an empty folder, to write to."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"--out {path} exists and is not an empty folder")


def refuse(message: str) -> NoReturn:
    """Exit with code 2, without a traceback; rank 0 names the program and says ``message``."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)
