"""Choose from held-out data when a reward model thinks: the thresholds of `rm.cascade`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.distributed import derive_seed
from common.files import read_jsonl, sha256
from launch.evaluation.preference import reward_of
from rm.cascade import (
    AffineFit,
    Thinking,
    confidence_of,
    discordant_pairs,
    fit_scale,
    harm,
    threshold_from,
)

if TYPE_CHECKING:
    from launch.evaluation.results_table import Row
    from rm.cascade import Method, Risk, Threshold

    Videos = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Guarantee:
    """What a threshold promises, see `rm.cascade.Threshold`."""

    method: Method
    risk: Risk
    alpha: float
    delta: float

    def threshold(
        self,
        confidence: Sequence[float],
        losses: Sequence[float],
        files: Sequence[str] = (),
    ) -> Threshold:
        """Choose the threshold on held-out items; ``files`` are hashes of their scores."""
        return threshold_from(
            confidence,
            losses,
            method=self.method,
            risk=self.risk,
            alpha=self.alpha,
            delta=self.delta,
            sha256=files,
        )


@dataclass(frozen=True)
class HeldoutPairs:
    """Rewards of the same pairs without and behind a chain of thought, (N,) each.

    A missing reward is NaN. ``fast_N2`` is raw, before it is put on the scale of ``slow_N2``.
    """

    label_N: list[int]
    fast_N2: torch.Tensor
    slow_N2: torch.Tensor

    @classmethod
    def read(cls, fast: Path, slow: Path) -> HeldoutPairs:
        """Join two folders of launch/evaluate.py rm.

        Raises ValueError where they are not about the same pairs.
        """
        # Several ranks may have written the rows in another order.
        rows_fast = {row["index"]: row for row in _rows(fast)}
        rows_slow = {row["index"]: row for row in _rows(slow)}
        if rows_fast.keys() != rows_slow.keys():
            raise ValueError(
                f"{fast} has {len(rows_fast)} pairs and {slow} has {len(rows_slow)}, or others: "
                "evaluate the same table twice"
            )
        # Pair by pair, fast beside slow.
        labels = []
        values: tuple[list[list[float]], ...] = ([], [])
        for index in sorted(rows_slow):
            pair = (rows_fast[index], rows_slow[index])
            if pair[0]["prompt"] != pair[1]["prompt"]:
                raise ValueError(f"pair {index} of {fast} is not that of {slow}")
            labels.append(pair[1]["label"])
            for row, column in zip(pair, values, strict=True):
                column.append([_number(reward_of(row, side)) for side in "AB"])
        return cls(labels, *map(torch.tensor, values))

    def fit(self) -> AffineFit:
        """Fit the slow rewards of all videos by the fast ones."""
        return fit_scale(self.fast_N2.flatten(), self.slow_N2.flatten())

    def items(self, risk: Risk) -> list[int]:
        """Pairs that have this risk: harm needs a pair that people decided."""
        numbers = range(len(self.label_N))
        return [i for i in numbers if risk == "disagreement" or self.label_N[i]]


def pair_threshold(
    pairs: HeldoutPairs, fit: AffineFit, promise: Guarantee, files: Sequence[str] = ()
) -> Threshold:
    """Choose the threshold for two videos of a prompt."""
    # On the scale of the slow rewards, as the scorer compares them.
    fast_N2 = fit.offset + fit.slope * pairs.fast_N2
    confidence = []
    losses = []
    for i in pairs.items(promise.risk):
        confidence.append(confidence_of(fast_N2[i], sigma=fit.sigma))
        if promise.risk == "harm":
            margins = [
                float(value_N2[i, 0] - value_N2[i, 1])
                for value_N2 in (fast_N2, pairs.slow_N2)
            ]
            losses.append(harm(*margins, pairs.label_N[i]))
        else:
            losses.append(float(discordant_pairs(fast_N2[i], pairs.slow_N2[i])))
    return promise.threshold(confidence, losses, files)


def group_threshold(
    fast: Videos, slow: Videos, fit: AffineFit, promise: Guarantee, files: Sequence[str]
) -> Threshold:
    """Choose the threshold for more videos of a prompt, {prompt: {video: reward}} each.

    The loss of a group is the share of its pairs whose order differs. Clopper-Pearson needs
    losses of 0 and 1: it takes a single pair of each group, drawn by the prompt, which has the
    same mean. Raises ValueError for other videos in one of the two, and without a group.
    """
    # The same videos of the same prompts.
    if {p: set(v) for p, v in fast.items()} != {p: set(v) for p, v in slow.items()}:
        raise ValueError("the fast and the slow scores are of other videos or prompts")
    confidence = []
    losses = []
    for prompt, rewards in sorted(slow.items()):
        # A pair has a threshold of its own.
        names = sorted(rewards)
        if len(names) < 3:
            continue
        slow_G = torch.tensor([rewards[name] for name in names])
        fast_G = torch.tensor([fit.apply(fast[prompt][name]) for name in names])
        differs_M = discordant_pairs(fast_G, slow_G)
        loss = float(differs_M.mean())
        # One pair stands for its group: 0 or 1, with the same mean.
        if promise.method == "clopper_pearson":
            drawn = derive_seed("calibrate", prompt) % len(differs_M)
            loss = float(differs_M[drawn])
        confidence.append(confidence_of(fast_G, sigma=fit.sigma))
        losses.append(loss)
    if not losses:
        raise ValueError("no prompt has 3 videos or more, so there is no group")
    return promise.threshold(confidence, losses, files)


def thinking_from(
    pairs: HeldoutPairs,
    promise: Guarantee,
    *,
    cots: int,
    files: Sequence[str],
    groups: tuple[Path, Path] | None = None,
    group_promise: Guarantee | None = None,
) -> Thinking:
    """Choose the thresholds of a checkpoint from held-out pairs, and perhaps from groups.

    groups  Outputs of launch/score.py without and behind a chain of thought, on the same videos.
    """
    # The common scale comes from the pairs, whose videos are all scored both ways.
    fit = pairs.fit()
    of_groups = None
    if groups is not None and group_promise is not None:
        fast, slow = map(_videos, groups)
        hashes = [sha256(path) for path in groups]
        of_groups = group_threshold(fast, slow, fit, group_promise, hashes)
    return Thinking(
        offset=fit.offset,
        slope=fit.slope,
        sigma=fit.sigma,
        cots=cots,
        pairs=pair_threshold(pairs, fit, promise, files),
        groups=of_groups,
    )


def _videos(path: Path) -> Videos:
    """Rewards of an output of launch/score.py that has a single reward."""
    videos: dict[str, dict[str, float]] = defaultdict(dict)
    for row in read_jsonl(path):
        if len(row["rewards"]) != 1:
            names = ", ".join(row["rewards"])
            raise ValueError(f"{path} must have a single reward, it has {names}")
        (value,) = row["rewards"].values()
        videos[row["prompt"]][row["video"]] = _number(value)
    return dict(videos)


def _rows(folder: Path) -> list[Row]:
    return read_jsonl(folder / "results.jsonl")


def _number(value: float | None) -> float:
    return math.nan if value is None else value
