"""Find the folder of a Wan on this machine or on the hub, and check what needs no weights."""

from __future__ import annotations

import math
from pathlib import Path

from common.files import model_folder
from generator.family import CONFIG, INDEX, PARTS, Family, read_object


def find_wan(path: str) -> Path:
    """Return the folder of a supported Wan: ``path``, or where the hub's library keeps this name.

    Its JSON files are checked before weights are downloaded. Raises FileNotFoundError where there
    is none, and ValueError where it is of another kind.
    """
    folder = model_folder(path, INDEX, patterns=["*.json"])
    family = require_supported(folder)
    if Path(path).is_dir():
        return folder
    # Weights that are not read are not downloaded.
    wanted = ["*.json", "tokenizer/*"]
    wanted += [f"{part}/*.safetensors" for part in {*PARTS, *family.experts}]
    if family.image == "channels+clip":
        wanted.append("image_encoder/*.safetensors")
    return model_folder(path, INDEX, patterns=wanted)


def require_supported(folder: Path) -> Family:
    """Return what a folder holds; raise ValueError, saying what it is, for another model."""
    family = Family.of(folder)
    vae_file = folder / "vae" / CONFIG
    if vae_file.is_file():
        _require_statistics(vae_file)
    return family


def _require_statistics(file: Path) -> None:
    """Raise ValueError without the latents' means and deviations: the library has defaults."""
    vae = read_object(file)
    for key in ("latents_mean", "latents_std"):
        values = vae.get(key)
        numbers = values if isinstance(values, list) else []
        lowest = 0.0 if key == "latents_std" else -math.inf
        sound = [type(n) in (int, float) and lowest < n < math.inf for n in numbers]
        if len(sound) != vae.get("z_dim", 16) or not all(sound):
            raise ValueError(
                f"{file} needs {key}, a number for each latent channel (std above 0): latents are "
                "scaled by them"
            )
