"""A trained DeScore as a reward model: think, then score, on one copy of the weights and one prefill."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.distributed import derive_seed
from common.memory import AdaptiveBatcher
from common.types import Score
from rm.calibration import Calibration
from rm.generate import generate, rewards_from_cache
from rm.model import DeScore
from rm.prompt import DIMENSIONS, parse_answer
from rm.video import PreparedVideo, prepare


class DeScoreScorer:
    """The Protocol `common.types.RewardModel`: chains of thought about a video, then the head.

    It writes with `rm.generate` itself, never with a `rm.cot_backend`: the reward is one token more on that KV cache.

    batch   videos judged at once; halved for good when memory runs out
    chains  chains of thought of each video. 1: one, as the checkpoint's generation says (greedy, unless it was saved
            otherwise). N > 1: sampled, at temperature 1 if the checkpoint's is 0, and the reward is their MEAN; prompt
            and video are read once. 0: score at once, which random masking in stage 1 trains too
    value   "head"; or "overall": the overall score the chain states (the coupled generative baseline), NaN without one
    calibration  rewards become (r - mean) / std of validation videos, each dimension by itself; None leaves them raw
    """

    name = "descore"

    def __init__(
        self,
        model: DeScore,
        *,
        batch: int = 32,
        chains: int = 1,
        value: Literal["head", "overall"] = "head",
        calibration: Calibration | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        if chains < 0:
            raise ValueError(f"chains={chains} must be at least 0")
        if value not in ("head", "overall"):
            raise ValueError(f"value={value!r} must be 'head' or 'overall'")
        if value == "overall" and (chains == 0 or calibration is not None):
            raise ValueError(
                "value='overall' reads the chain of thought: chains must be at least 1, and uncalibrated"
            )
        if (
            calibration is not None
            and calibration.mean.keys() != model.dimensions.keys()
        ):
            raise ValueError(
                f"a calibration of {list(calibration.mean)} for a judge of {list(model.dimensions)}"
            )
        if calibration is not None and calibration.chains != chains:
            raise ValueError(
                f"calibrated with chains={calibration.chains}, which are other rewards than chains={chains}"
            )
        self.value, self.calibration = value, calibration
        self.model, self.chains = (
            model.eval().requires_grad_(requires_grad=False),
            chains,
        )
        self.portions = AdaptiveBatcher(batch, what="videos before the judge")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        calibrated: bool = False,
        **options: Any,
    ) -> DeScoreScorer:
        """Read a folder that `DeScore.save` wrote; nothing else is needed. Errors as `DeScore.load`.

        device      None is this rank's GPU, or the CPU
        dtype       of the backbone (query and head stay fp32); None is bfloat16 on a GPU and float32 on a CPU
        calibrated  by the folder's calibration.json; FileNotFoundError if launch/calibrate.py has not made it
        options     as above
        """
        if device is None:
            device = (
                torch.device("cuda", torch.cuda.current_device())
                if torch.cuda.is_available()
                else "cpu"
            )
        if dtype is None:
            dtype = "float32" if torch.device(device).type == "cpu" else "bfloat16"
        if calibrated:
            options["calibration"] = Calibration.load(path)
        return cls(
            DeScore.load(path, dtype=getattr(torch, dtype)).to(device), **options
        )

    @torch.no_grad()
    def score(
        self,
        videos: Tensor | Sequence[Tensor | str | Path],
        prompts: Sequence[str],
        *,
        fps: float | None = None,
    ) -> Score:
        """Rewards (B,): raw logits unless calibrated, so that only their order and differences mean something.

        videos  uint8 (B, T, Y, X, 3), or a sequence of uint8 (T, Y, X, 3) and of files; frames need ``fps``. Equal ones
                under equal prompts are judged once, and a permuted batch has permuted scores to the bit

        parts   the five sub-dimension scores the chain of thought states, NaN where it states none or N/A; of several
                chains their MEAN over those that state one, and "spread", the population std of the rewards.
                "reward.NAME" for each dimension of a judge that has several
        texts   the chains of thought, of several the first ("" without any)

        A chain that is not finished within the checkpoint's token limit is written once more with twice the limit;
        if that is not enough either, it does not count, and a video without any that counts is not judged: NaN.
        Raises VideoError naming a file it cannot read.
        """
        if len(videos) != len(prompts):
            raise ValueError(f"score: {len(videos)} videos for {len(prompts)} prompts")
        if not len(prompts):
            return Score(torch.zeros(0))
        # sums of floats depend on a row's place in a batch: places are given by what the rows are, each is judged once
        keys = [
            _identity(video, prompt)
            for video, prompt in zip(videos, prompts, strict=True)
        ]
        order = sorted(set(keys))
        rows = [keys.index(key) for key in order]
        found = self._score(
            [videos[i] for i in rows], [prompts[i] for i in rows], fps=fps
        )
        place = {key: k for k, key in enumerate(order)}
        return found.take([place[key] for key in keys])

    def _score(
        self,
        videos: Sequence[Tensor | str | Path],
        prompts: Sequence[str],
        *,
        fps: float | None,
    ) -> Score:
        def judge(part: slice) -> _Judged:
            return self._judge(
                prompts[part],
                [
                    prepare(video, self.model.settings, fps=fps)
                    for video in videos[part]
                ],
            )

        judged = self.portions.each(judge, len(prompts))
        reward_BNK = self._calibrated(torch.cat([part.reward_BNK for part in judged]))
        texts = [own for part in judged for own in part.texts]
        if self.value == "overall":  # of chains that count, which have a reward
            stated_BN = _overall([text for own in texts for text in own]).view(
                -1, self.chains
            )
            reward_BN = stated_BN.masked_fill(reward_BNK[..., 0].isnan(), math.nan)
        else:
            reward_BN = self.model.total(reward_BNK)
        value_B = _mean_of_judged(reward_BN)
        parts = {}
        if len(self.model.dimensions) > 1:
            names = self.model.dimensions
            parts |= {
                f"reward.{name}": _mean_of_judged(reward_BNK[..., k])
                for k, name in enumerate(names)
            }
        if self.chains == 0:
            return Score(value_B, parts, [""] * len(prompts))
        stated = _parts([text for own in texts for text in own])
        parts |= {
            name: _mean_of_judged(part.view(-1, self.chains))
            for name, part in stated.items()
        }
        if self.chains > 1:
            parts["spread"] = _mean_of_judged(
                (reward_BN - value_B.unsqueeze(1)).square()
            ).sqrt()
        return Score(value_B, parts, [own[0] for own in texts])

    def _calibrated(self, reward_BNK: Tensor) -> Tensor:
        if self.calibration is None:
            return reward_BNK
        names = list(self.model.dimensions)
        mean_K, std_K = (
            torch.tensor([by[n] for n in names])
            for by in (self.calibration.mean, self.calibration.std)
        )
        return (reward_BNK - mean_K) / std_K

    def _judge(
        self, prompts: Sequence[str], videos: Sequence[PreparedVideo]
    ) -> _Judged:
        encoded = [
            self.model.encode(prompt, video)
            for prompt, video in zip(prompts, videos, strict=True)
        ]
        if self.chains == 0:
            batch = self.model.batch(encoded, videos).to(self.model.device)
            return _Judged(self.model(batch).cpu().unsqueeze(1), [[""]] * len(prompts))
        count = self.chains
        reward_BNK = torch.full(
            (len(prompts), count, len(self.model.dimensions)), math.nan
        )
        texts = [[""] * count for _ in prompts]
        waiting = list(range(len(prompts)))
        how = self.model.generation
        if count > 1 and how.temperature == 0:
            how = replace(how, temperature=1.0)
        for limit in (how.max_new_tokens, 2 * how.max_new_tokens):
            batch = self.model.batch(
                [encoded[i] for i in waiting], [videos[i] for i in waiting], query=False
            )
            seeds = self._seeds(prompts, waiting) if how.temperature > 0 else None
            written = generate(
                self.model,
                batch,
                replace(how, max_new_tokens=limit),
                seeds=seeds,
                copies=count,
            )
            reward_WNK = (
                rewards_from_cache(self.model, written)
                .float()
                .cpu()
                .unflatten(0, (-1, count))
            )
            finished_WN = written.finished_B.cpu().view(-1, count)
            reward_BNK[waiting] = reward_WNK.masked_fill(
                ~finished_WN.unsqueeze(-1), math.nan
            )
            for row, i in enumerate(waiting):
                texts[i] = [
                    self.model.tokenizer.decode(written.ids(row * count + n))
                    for n in range(count)
                ]
            # the same seeds write the same chains: those that were finished come out again
            waiting = [i for row, i in enumerate(waiting) if not finished_WN[row].all()]
            if not waiting:
                break
        return _Judged(reward_BNK, texts)

    def _seeds(self, prompts: Sequence[str], rows: Sequence[int]) -> list[int]:
        """By prompt, so that no score depends on a place in the batch."""
        first = [derive_seed("score", prompts[i]) for i in rows]
        return [
            derive_seed(seed, n) if n else seed
            for seed in first
            for n in range(self.chains)
        ]


def _identity(video: Tensor | str | Path, prompt: str) -> bytes:
    """Equal for equal videos, or equal paths, under equal prompts."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=16)
    if isinstance(video, Tensor):
        digest.update(str(tuple(video.shape)).encode())
        digest.update(video.contiguous().numpy())
    else:
        digest.update(str(video).encode())
    return digest.digest()


@dataclass(frozen=True)
class _Judged:
    """Rewards (B, N, K), NaN for a chain that never finished, and the N texts of each video."""

    reward_BNK: Tensor
    texts: list[list[str]]


def _mean_of_judged(x_BN: Tensor) -> Tensor:
    """MEAN over N without NaN; NaN where there is nothing else."""
    return x_BN.nanmean(1)


def _overall(texts: Sequence[str]) -> Tensor:
    answers = [parse_answer(text) for text in texts]
    return _floats([None if answer is None else answer.overall for answer in answers])


def _parts(texts: Sequence[str]) -> dict[str, Tensor]:
    answers = [parse_answer(text) for text in texts]
    return {
        name: _floats(
            [None if answer is None else answer.scores.get(name) for answer in answers]
        )
        for name in DIMENSIONS
    }


def _floats(values: Sequence[float | None]) -> Tensor:
    """fp32, NaN for None; whole numbers alone would make an integer tensor, which cannot hold a NaN."""
    return torch.tensor(
        [math.nan if value is None else value for value in values], dtype=torch.float32
    )
