"""Keep a script's folder from hiding other packages, and from running another copy of us."""

from __future__ import annotations

import sys
from pathlib import Path


def leave_script_folder(package_file: str) -> None:
    """Take a package's folder off ``sys.path``, where Python puts the folder of a script.

    Our file names would hide other packages there: a user's reward with `import evaluate`
    would get launch/evaluate.py. Exits with code 2 when the running script belongs to
    another copy of the package, because edits in that checkout would have no effect.
    """
    folder = Path(package_file).resolve().parent
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is not None:
        script_folder = Path(script).resolve().parent
        has_same_name = script_folder.name == folder.name and script_folder != folder
        # Another folder of that name, tests/launch for one, is no copy of the project.
        is_project = (script_folder.parent / "common" / "script_folder.py").is_file()
        if has_same_name and is_project:
            sys.stderr.write(
                f"{script} belongs to a checkout, but Python imports the installed copy in "
                f"{folder.parent}. Install the checkout with `pip install -e .`, or run the "
                f"installed command: python -m {folder.name}.{Path(script).stem}\n"
            )
            sys.exit(2)
    sys.path[:] = [
        entry for entry in sys.path if not entry or Path(entry).resolve() != folder
    ]
