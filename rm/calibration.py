"""Calibration of a reward: its mean and std on validation videos.

Bradley-Terry sees differences only, so a trained reward has an arbitrary offset and scale.
VideoAlign (arXiv 2501.13918, appendix H.2) reports z = (r - mean) / std of each dimension
before it adds dimensions up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, pstdev
from typing import Annotated

from pydantic import AliasChoices, Field, FiniteFloat

from common.files import write_json
from common.schema import config, read_section

CALIBRATION_FILE = "calibration.json"


@config
class Calibration:
    """Mean and POPULATION std of the rewards by dimension.

    ``videos`` is the number of validation videos, ``cots`` the number of chains of thought that
    each was scored with; version 0.1 wrote it as ``chains``.
    """

    mean: dict[str, FiniteFloat]
    std: dict[str, Annotated[FiniteFloat, Field(gt=0)]]
    videos: int
    cots: Annotated[int, Field(validation_alias=AliasChoices("cots", "chains"))]

    def __post_init__(self) -> None:
        if self.mean.keys() != self.std.keys() or not self.mean:
            raise ValueError(
                "mean and std must name the same dimensions, "
                f"got {list(self.mean)} and {list(self.std)}"
            )

    @classmethod
    def of(
        cls, rewards: Mapping[str, Sequence[float | None]], *, cots: int
    ) -> Calibration:
        """Compute the calibration of validation rewards by dimension.

        None and NaN (not scored) are left out. Raises ValueError if nothing is left.
        """
        mean = {}
        std = {}
        counts = []
        for name, values in rewards.items():
            scored = [r for r in values if r is not None and not math.isnan(r)]
            if not scored:
                raise ValueError(f"no video was scored in {name}")
            mean[name] = fmean(scored)
            std[name] = pstdev(scored)
            counts.append(len(scored))
        return cls(mean=mean, std=std, videos=min(counts), cots=cots)

    def save(self, folder: str | Path) -> Path:
        """Write the calibration into a checkpoint folder."""
        path = Path(folder) / CALIBRATION_FILE
        write_json(path, asdict(self))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Calibration:
        """Read the calibration of a checkpoint folder.

        Raises FileNotFoundError if there is none, and ValueError, naming the file, if it is
        not valid.
        """
        path = Path(folder) / CALIBRATION_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {CALIBRATION_FILE}: make it with launch/calibrate.py"
            )
        return read_section(cls, path)
