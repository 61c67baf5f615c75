"""A trained DeScore as a reward model: write a chain of thought (CoT), then score.

Both steps use the same weights and the same prefill of prompt and video.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from common.distributed import derive_seed
from common.log import say
from common.memory import AdaptiveBatcher, default_device
from common.renamed_keys import NEW_NAME
from common.types import Score
from rm.calibration import Calibration
from rm.config import CotEngine, CotInTraining, Generation, VllmConfig
from rm.cot_backend import CotBackend
from rm.generate import GeneratedCots, extend, generate, rewards_from_cache
from rm.model import DeScore
from rm.prepare_ahead import PreparedAhead
from rm.prompt import DIMENSIONS, Encoded, parse_answer
from rm.video import PreparedVideo


class DeScoreScorer:
    """DeScore behind the Protocol `common.types.RewardModel`.

    The reward is one more token on the KV cache that the CoT was generated with. Behind a CoT
    that vLLM wrote, it comes from a forward over prompt, video and CoT.

    batch   Videos per forward; halved for good when memory runs out.
    cots    CoTs per video. 0 scores without a CoT, which random masking in stage 1 trains.
            1 generates as the checkpoint says, by default greedily. N > 1 samples, at
            temperature 1 if the checkpoint's is 0, and the reward is the MEAN over CoTs.
            None is 0 for a model that was trained without CoTs and 1 for any other.
    value   "head" is the reward of the linear head. "overall" is the overall score that the
            CoT states (the coupled generative baseline), NaN if it states none.
    calibration  Turns rewards into (r - mean) / std of validation videos, by dimension.
    backend      Writes the CoTs with these weights, see `load`. None is the model itself.
    """

    name = "descore"

    def __init__(
        self,
        model: DeScore,
        *,
        batch: int = 32,
        cots: int | None = None,
        value: Literal["head", "overall"] = "head",
        calibration: Calibration | None = None,
        backend: CotBackend | None = None,
    ) -> None:
        # Settings that do not fit together.
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        if cots is not None and cots < 0:
            raise ValueError(f"cots={cots} must be at least 0")
        if value not in ("head", "overall"):
            raise ValueError(f"value={value!r} must be 'head' or 'overall'")
        self.cots = cots_of(model.cot_in_training, cots)
        if value == "overall" and (self.cots == 0 or calibration is not None):
            raise ValueError(
                "value='overall' reads the chain of thought: cots must be at least 1, "
                "without calibration"
            )
        if calibration is not None:
            _require_fit(calibration, model, self.cots)

        # A scorer never trains its model.
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.value = value
        self.calibration = calibration
        self.backend = backend
        self.portions = AdaptiveBatcher(batch, what="videos in the reward model")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        calibrated: bool = False,
        engine: CotEngine = "builtin",
        vllm: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> DeScoreScorer:
        """Load a checkpoint folder that `DeScore.save` wrote; errors as `DeScore.load`.

        device      None is this rank's GPU, or the CPU if there is none.
        dtype       Of the backbone; query and head stay fp32. None is bfloat16 on a GPU and
                    float32 on a CPU.
        calibrated  Uses the folder's calibration.json. Raises FileNotFoundError if
                    launch/calibrate.py has not written it.
        engine      "vllm" lets vLLM write the CoTs, in a process on the same GPU.
        vllm        The settings of `rm.config.VllmConfig` for it: ``python``, at least.
        options     Further arguments of the class. Raises ValueError for others.
        """
        _require_known(cls, options)
        # Where the model runs, and in which precision.
        if device is None:
            device = default_device()
        if dtype is None:
            on_cpu = torch.device(device).type == "cpu"
            dtype = "float32" if on_cpu else "bfloat16"

        if calibrated:
            options["calibration"] = Calibration.load(path)
        model = DeScore.load(path, dtype=getattr(torch, dtype)).to(device)
        options["backend"] = _backend(engine, vllm, model, Path(path))
        return cls(model, **options)

    @torch.no_grad()
    def score(
        self,
        videos: Tensor | Sequence[Tensor | str | Path],
        prompts: Sequence[str],
        *,
        fps: float | None = None,
    ) -> Score:
        """Compute rewards (B,); only their order and differences mean something.

        videos  uint8 (B, T, Y, X, 3), or a sequence of uint8 (T, Y, X, 3) and of files.
                Frames need ``fps``. Equal videos with equal prompts are scored once, and a
                permuted batch has permuted scores to the bit.

        The parts of the result are the five sub-dimension scores that the CoT states, NaN
        where it states none or N/A; with several CoTs their MEAN, and "spread", the population
        std of the rewards; with several dimensions, "reward.NAME" of each. The texts are the
        CoTs, of several the first.

        A CoT that does not finish within the checkpoint's token limit goes on to twice the
        limit. If it still does not finish, it does not count; a video without any finished CoT
        gets NaN.

        Raises VideoError, naming the file, for a file that cannot be read.
        """
        # A text is a sequence too, of its letters.
        for name, given in (("videos", videos), ("prompts", prompts)):
            if isinstance(given, str | bytes | Path):
                raise TypeError(f"score: {name} must be a list, got {given!r:.60}")
        if len(videos) != len(prompts):
            raise ValueError(f"score: {len(videos)} videos for {len(prompts)} prompts")
        if not len(prompts):
            return Score(torch.zeros(0))

        # Sums of floats depend on the place in a batch, so sort the rows by their content:
        # by length first, so that a batch has little padding.
        keys = []
        for video, prompt in zip(videos, prompts, strict=True):
            length = _length(self.model, video, prompt)
            keys.append((*length, identity(video, prompt)))
        unique_keys = sorted(set(keys))
        rows = [keys.index(key) for key in unique_keys]
        unique_videos = [videos[row] for row in rows]
        unique_prompts = [prompts[row] for row in rows]
        score = self._score_unique(unique_videos, unique_prompts, fps=fps)

        # Back to the order of the batch.
        place = {key: i for i, key in enumerate(unique_keys)}
        return score.take([place[key] for key in keys])

    def _score_unique(
        self,
        videos: Sequence[Tensor | str | Path],
        prompts: Sequence[str],
        *,
        fps: float | None,
    ) -> Score:
        # A stream of batches that fit into memory, the next prepared meanwhile.
        with PreparedAhead(videos, self.model.settings, fps=fps) as ahead:
            results = self.portions.each(
                lambda part: self._cot_rewards(prompts[part], ahead.take(part)),
                len(prompts),
            )
        reward_BNK = torch.cat([result.reward_BNK for result in results])
        reward_BNK = self._calibrated(reward_BNK)
        texts = []
        for result in results:
            texts += result.texts
        flat_texts = []
        for cot_texts in texts:
            flat_texts += cot_texts

        # The reward: MEAN over finished CoTs of the head's reward or of the stated score.
        if self.value == "overall":
            stated_BN = _overall(flat_texts).view(-1, self.cots)
            reward_BN = stated_BN.masked_fill(reward_BNK[..., 0].isnan(), math.nan)
        else:
            reward_BN = self.model.total(reward_BNK)
        value_B = reward_BN.nanmean(1)
        finished_BN = torch.cat([result.finished_BN for result in results])
        reasons = self._reasons(value_B, finished_BN)

        # The parts, for logs and tables.
        parts = {}
        if len(self.model.dimensions) > 1:
            for k, name in enumerate(self.model.dimensions):
                parts[f"reward.{name}"] = reward_BNK[..., k].nanmean(1)
        if self.cots == 0:
            return Score(value_B, parts, [""] * len(prompts), reasons)
        for name, stated in _parts(flat_texts).items():
            parts[name] = stated.view(-1, self.cots).nanmean(1)
        if self.cots > 1:
            variance_B = (reward_BN - value_B.unsqueeze(1)).square().nanmean(1)
            parts["spread"] = variance_B.sqrt()
        return Score(value_B, parts, [cot_texts[0] for cot_texts in texts], reasons)

    def _reasons(self, value_B: Tensor, finished_BN: Tensor) -> list[str]:
        """Why each video has no score, empty for one that has; [] when all have one."""
        limit = 2 * self.model.generation.max_new_tokens
        reasons = []
        for value, finished_N in zip(value_B, finished_BN, strict=True):
            if not value.isnan():
                reason = ""
            elif not finished_N.any():
                reason = f"the chain of thought did not end within {limit} tokens"
            elif self.value == "overall":
                reason = "the chain of thought states no overall score"
            else:
                reason = "the reward model's output is NaN"
            reasons.append(reason)
        return reasons if any(reasons) else []

    def _calibrated(self, reward_BNK: Tensor) -> Tensor:
        if self.calibration is None:
            return reward_BNK
        names = list(self.model.dimensions)
        mean_K = torch.tensor([self.calibration.mean[name] for name in names])
        std_K = torch.tensor([self.calibration.std[name] for name in names])
        return (reward_BNK - mean_K) / std_K

    def _cot_rewards(
        self, prompts: Sequence[str], videos: Sequence[PreparedVideo]
    ) -> _CotRewards:
        """Write N CoTs for every video and compute their rewards."""
        model = self.model
        encoded = []
        for prompt, video in zip(prompts, videos, strict=True):
            encoded.append(model.encode(prompt, video))
        if self.cots == 0:
            batch = model.batch(encoded, videos).to(model.device)
            reward_BK = model(batch).cpu()
            finished_BN = torch.ones(len(prompts), 1, dtype=torch.bool)
            return _CotRewards(
                reward_BK.unsqueeze(1), [[""]] * len(prompts), finished_BN
            )

        # Write N CoTs for every video.
        how = self._generation()
        seeds = None
        if how.temperature > 0:
            seeds = self._seeds(prompts)
        if self.backend is not None:
            return self._rewards_with_backend(encoded, videos, how, seeds)
        batch = model.batch(encoded, videos, query=False)
        written = generate(model, batch, how, seeds=seeds, copies=self.cots)
        reward_RK, texts = self._read(written)
        finished_R = written.finished_B.clone()

        # Those that the limit cut off go on to twice the limit.
        rows = (~finished_R).nonzero().squeeze(1).tolist()
        if rows:
            longer = extend(
                model,
                written,
                rows,
                replace(how, max_new_tokens=2 * how.max_new_tokens),
                seeds=None if seeds is None else [seeds[row] for row in rows],
            )
            reward_RK[rows], longer_texts = self._read(longer)
            finished_R[rows] = longer.finished_B
            for row, text in zip(rows, longer_texts, strict=True):
                texts[row] = text
        firsts = range(0, len(texts), self.cots)
        return _CotRewards(
            reward_RK.unflatten(0, (-1, self.cots)),
            [texts[first : first + self.cots] for first in firsts],
            finished_R.view(-1, self.cots),
        )

    def _rewards_with_backend(
        self,
        encoded: Sequence[Encoded],
        videos: Sequence[PreparedVideo],
        how: Generation,
        seeds: Sequence[int] | None,
    ) -> _CotRewards:
        """Let the backend write N CoTs for every video, and compute the rewards behind them."""
        # 1. Up to twice the limit. The backend's memory is free again before our forward.
        longer = replace(how, max_new_tokens=2 * how.max_new_tokens)
        self.backend.sync(0)
        groups = self.backend.write(
            encoded, videos, longer, version=0, seeds=seeds, copies=self.cots
        )
        self.backend.rest()

        # 2. The sequences whose CoT has ended.
        texts = []
        finished = []
        sequences = []
        shown = []
        for item, video, cots in zip(encoded, videos, groups, strict=True):
            texts.append([self.model.tokenizer.decode(list(cot.ids)) for cot in cots])
            finished.append([cot.finished for cot in cots])
            for cot in cots:
                if cot.finished:
                    sequences.append(Encoded(item.prompt_ids, cot.ids))
                    shown.append(video)

        # 3. One forward over prompt, video, CoT and query.
        finished_BN = torch.tensor(finished)
        shape = (*finished_BN.shape, len(self.model.dimensions))
        reward_BNK = torch.full(shape, math.nan)
        if sequences:
            batch = self.model.batch(sequences, shown).to(self.model.device)
            reward_BNK[finished_BN] = self.model(batch).float().cpu()
        return _CotRewards(reward_BNK, texts, finished_BN)

    def _read(self, written: GeneratedCots) -> tuple[Tensor, list[str]]:
        """Rewards (R, K) and texts of R CoTs; a CoT that did not finish has reward NaN."""
        reward_RK = rewards_from_cache(self.model, written).float().cpu()
        reward_RK[~written.finished_B] = math.nan
        decode = self.model.tokenizer.decode
        texts = [decode(written.ids(row)) for row in range(len(reward_RK))]
        return reward_RK, texts

    def _generation(self) -> Generation:
        """The checkpoint's settings; several CoTs need a temperature."""
        how = self.model.generation
        if self.cots > 1 and how.temperature == 0:
            return replace(how, temperature=1.0)
        return how

    def _seeds(self, prompts: Sequence[str]) -> list[int]:
        """Seeds by prompt, so that no score depends on a place in the batch."""
        seeds = []
        for prompt in prompts:
            first = derive_seed("score", prompt)
            seeds.append(first)
            seeds += [derive_seed(first, n) for n in range(1, self.cots)]
        return seeds


@dataclass(frozen=True)
class _CotRewards:
    """Rewards (B, N, K), NaN for a CoT that never finished, and the N texts of each video.

    ``finished_BN`` tells which CoTs finished; a score without a CoT counts as finished.
    """

    reward_BNK: Tensor
    texts: list[list[str]]
    finished_BN: Tensor


def cots_of(cot_in_training: CotInTraining | None, cots: int | None) -> int:
    """CoTs per video: ``cots``, or for None what the model was trained with.

    Prints a warning when a model that was trained without CoTs is asked for some.
    """
    if cots is None:
        return 0 if cot_in_training == "never" else 1
    if cots and cot_in_training == "never":
        say(
            f"WARNING: cots={cots}, but this reward model was trained without chains of "
            "thought: its rewards behind one are not what it learned (leave out cots, or 0)"
        )
    return cots


def _backend(
    engine: str, vllm: Mapping[str, Any] | None, model: DeScore, path: Path
) -> CotBackend | None:
    """Make the backend that writes the CoTs of a checkpoint; None is the model itself."""
    if engine not in get_args(CotEngine):
        known = " or ".join(get_args(CotEngine))
        raise ValueError(f"engine={engine!r} must be {known}")
    if engine == "builtin":
        return None
    if "python" not in (vllm or {}):
        raise ValueError(
            "engine=vllm needs vllm.python, the interpreter of vLLM's environment"
        )
    from rm.vllm.client import VllmBackend

    return VllmBackend(VllmConfig(**vllm), model, checkpoint=path)


def _require_known(cls: type, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that the class does not take, with the nearest it takes."""
    known = list(inspect.signature(cls).parameters)[1:]
    for option in options:
        if option in known:
            continue
        close = [NEW_NAME.get(option)]
        if close[0] not in known:
            close = difflib.get_close_matches(option, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{option!r} is not an option of DeScore{hint}")


def _require_fit(calibration: Calibration, model: DeScore, cots: int) -> None:
    """Raise ValueError if a calibration was made for other rewards."""
    if calibration.mean.keys() != model.dimensions.keys():
        raise ValueError(
            f"a calibration of {list(calibration.mean)} "
            f"for a reward model of {list(model.dimensions)}"
        )
    if calibration.cots != cots:
        raise ValueError(
            f"the calibration was made with cots={calibration.cots}, not cots={cots}"
        )


def _length(model: DeScore, video: Tensor | str | Path, prompt: str) -> tuple[int, int]:
    """What orders sequences by length: the pixels of frames, and the tokens of the prompt."""
    pixels = 0
    if isinstance(video, Tensor):
        pixels = video.numel()
    return pixels, len(model.tokenizer(prompt)["input_ids"])


def identity(video: Tensor | str | Path, prompt: str) -> bytes:
    """A key that is equal for equal videos, or equal paths, with equal prompts."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=16)
    if isinstance(video, Tensor):
        digest.update(str(tuple(video.shape)).encode())
        digest.update(video.contiguous().numpy())
    else:
        digest.update(str(video).encode())
    return digest.digest()


def _overall(texts: Sequence[str]) -> Tensor:
    """The overall score that each CoT states, NaN if none."""
    answers = [parse_answer(text) for text in texts]
    return _floats([answer and answer.overall for answer in answers])


def _parts(texts: Sequence[str]) -> dict[str, Tensor]:
    """The sub-dimension scores that each CoT states, NaN if none."""
    answers = [parse_answer(text) for text in texts]
    parts = {}
    for name in DIMENSIONS:
        parts[name] = _floats(
            [answer and answer.scores.get(name) for answer in answers]
        )
    return parts


def _floats(values: Sequence[float | None]) -> Tensor:
    """An fp32 tensor with NaN for None."""
    numbers = [math.nan if value is None else value for value in values]
    return torch.tensor(numbers, dtype=torch.float32)
