"""Install with ``pip install -c constraints.txt -e ".[test]"``, or with ``make install``.

Ranges stand here, tested versions in constraints.txt. The upper bound of torch keeps pip on
a release that has a CPU wheel. On a CUDA machine install the torch build for its driver first.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = (
    "common",
    "rm",
    "generator",
    "engine",
    "alignment",
    "launch",
    "toy",
    "experiments",
)
ROOT = Path(__file__).parent
SERVER = ["fastapi>=0.115", "uvicorn>=0.30"]  # launch/serve.py
SIGNALS = ["opencv-python-headless>=4.9"]  # the reward dynamics
TENSORBOARD = ["tensorboard>=2.16"]  # the key tensorboard of a run
# `make docs` installs these into an environment of their own.
DOCS = [
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.5",
    "mkdocstrings[python]>=0.30",
    "ruff>=0.11",
]


def packages() -> list[str]:
    """Return every package, and the folders of data that ship inside of launch."""
    patterns = []
    for room in ROOMS:
        patterns += [room, f"{room}.*"]
    return [*find_packages(include=patterns), "launch.assets", "launch.configs"]


setup(
    name="video-alignment",
    version="0.3.0",
    description=(
        "RLHF post-training of video diffusion models: DeScore rewards, Longcat-GRPO and "
        "Flow-DPO for Wan 2.1"
    ),
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The video-alignment authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords=["RLHF", "video diffusion", "reward model", "GRPO", "DPO", "Wan"],
    python_requires=">=3.11",
    packages=packages(),
    # Recipes and the tiny models ship inside of launch, see common/shipped.py.
    package_dir={"launch.assets": "assets", "launch.configs": "configs"},
    package_data={
        **{room: ["py.typed"] for room in ROOMS},
        "launch": ["py.typed", "templates/*", "nodes/*"],
        "launch.assets": ["**/*"],
        "launch.configs": ["**/*"],
    },
    install_requires=[
        "torch>=2.6,<2.14",
        "deepspeed>=0.18",
        "diffusers>=0.42",
        "transformers>=5.0",
        "accelerate>=1.0",
        "peft>=0.18",
        "tokenizers>=0.22",
        "sentencepiece>=0.2",
        "ftfy>=6.1",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "omegaconf>=2.4",
        "pydantic>=2.10",
        "pyyaml>=6.0",
        "numpy>=1.26",
        "scipy>=1.11",
        "pillow>=10.0",
        "psutil>=5.9",
        "decord2>=3.0",  # experiments/bench/film_reader.py compares with it
        "imageio>=2.31",
        "imageio-ffmpeg>=0.5",
        "av>=18.0",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "tqdm>=4.66",
        "wandb>=0.19",
        # The client of a reward server.
        "httpx>=0.27",
        "tenacity>=9.0",
    ],
    # No extra for vbench: it pins transformers==4.33.2 and numpy<2, and needs an
    # environment of its own, docs/vbench.md.
    extras_require={
        "server": SERVER,
        "signals": SIGNALS,
        "tensorboard": TENSORBOARD,
        "docs": DOCS,
        "test": [
            *SERVER,
            *SIGNALS,
            *TENSORBOARD,
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "import-linter>=2.3",
            "psutil>=5.9",
            "ruff>=0.11",
        ],
    },
)
