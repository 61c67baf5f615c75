"""A reward's zero and unit: the mean and spread it has on validation videos, so that rewards can be added up.

Bradley-Terry sees differences only, so a trained reward has an arbitrary offset and scale. VideoAlign (2501.13918,
appendix H.2) reports z = (r - mean) / std, each dimension by itself, before it adds dimensions up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev

CALIBRATION_FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """mean, std by dimension (POPULATION std), over ``videos`` videos judged with ``chains`` chains of thought each."""

    mean: Mapping[str, float]
    std: Mapping[str, float]
    videos: int
    chains: int

    def __post_init__(self) -> None:
        if self.mean.keys() != self.std.keys() or not self.mean:
            raise ValueError(
                f"mean and std must name the same dimensions, got {list(self.mean)} and {list(self.std)}"
            )
        for name, std in self.std.items():
            if not (math.isfinite(self.mean[name]) and math.isfinite(std) and std > 0):
                raise ValueError(
                    f"{name!r} has mean {self.mean[name]} and std {std}: no scale to measure by"
                )

    @classmethod
    def of(
        cls, rewards: Mapping[str, Sequence[float | None]], *, chains: int
    ) -> Calibration:
        """Of validation rewards by dimension; None and NaN (unjudged) are left out. ValueError if nothing is left."""
        judged = {
            n: [r for r in values if r is not None and not math.isnan(r)]
            for n, values in rewards.items()
        }
        if empty := [name for name, values in judged.items() if not values]:
            raise ValueError(f"no video was judged in {', '.join(empty)}")
        return cls(
            {name: fmean(values) for name, values in judged.items()},
            {name: pstdev(values) for name, values in judged.items()},
            videos=min(map(len, judged.values())),
            chains=chains,
        )

    def save(self, folder: str | Path) -> Path:
        """Write it beside the weights."""
        path = Path(folder) / CALIBRATION_FILE
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Calibration:
        """FileNotFoundError that says how to make one; ValueError, naming the file, for one that is not."""
        path = Path(folder) / CALIBRATION_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {CALIBRATION_FILE}: make it with launch/calibrate.py"
            )
        raw = json.loads(path.read_text(encoding="utf-8"))
        try:
            return cls(**raw)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
