"""The config of a rehearsal: one unit of work, with stand-ins for models and data that are missing.

`adapt` keeps every setting that decides what a unit costs. It shortens the run to a unit, moves its
outputs to a temporary folder, and makes folders of models without weights, prompts, videos and
pairs of the planned sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import write_json
from generator.config import check_wan
from launch.planning import known_models
from launch.planning.models import COT_TOKENS
from launch.schemas.evaluation import GeneratorEvaluation, ScoreRun
from launch.schemas.pairs import DpoRun, PairsRun
from launch.schemas.server import ServeRun
from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun, SampleRun

if TYPE_CHECKING:
    import torch

    from alignment.config import RewardConfig
    from generator.config import GeneratorConfig

# A rank runs at most so many equal parts of a step; the rest is counted by multiplication.
MOST_GROUPS = 8
MOST_PAIRS = 4
MOST_UPDATES = 2
# The video that reward models read where no generator says its size.
FRAMES = 81
HEIGHT = 480
WIDTH = 832
FPS = 16.0
EMBEDDED_TOKENS = 40
WITHOUT_VLLM = "engine builtin instead of vllm, whose process is not simulated"
SCORED_VIDEOS = 4


@dataclass
class Adapted:
    """A config that makes a single unit.

    unit     What is made: an update, a step, a prompt, ...
    repeats  How many times as much a whole unit does, in the phases that are not ``once``.
    notes    What stands for what.
    flags    Values for options of the command that are not in the config.
    """

    cfg: Any
    unit: str
    repeats: float = 1.0
    notes: list[str] = field(default_factory=list)
    flags: dict[str, Any] = field(default_factory=dict)


class StandIns:
    """Makes what a rehearsal needs, in a temporary folder."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder = folder
        self.ranks = ranks
        self.notes: list[str] = []

    # ------------------------------------------------------------------ models

    def generator(self, cfg: GeneratorConfig) -> GeneratorConfig:
        """Replace a generator that is not on this machine by a folder without weights.

        Raises ValueError for a name whose sizes are not known.
        """
        from launch.planning.models import MetaWan
        from launch.rehearsal.model_folders import wan_folder

        family = known_models.wan_family(cfg.path)
        if family.boundary is not None and cfg.experts.offload:
            # weights without numbers cannot lie on the host
            cfg = replace(cfg, experts=replace(cfg.experts, offload=False))
            self.notes.append(
                "generator.experts.offload: both transformers are on the device all the time"
            )
        if family.needs_image:
            raise ValueError(
                f"generator.path={cfg.path} makes videos of images, which cannot be rehearsed; "
                "--dry-run plans it"
            )
        small = cfg.scoring_decoder
        if small is not None and not Path(small).is_dir():
            file = self._new("scoring-decoder") / "config.json"
            write_json(file, known_models.small_decoder(MetaWan(cfg).vae.config))
            cfg = replace(cfg, scoring_decoder=str(file.parent))
            self.notes.append(f"generator.scoring_decoder: {small} has TAESD's sizes")
        if Path(cfg.path).is_dir():
            return cfg
        if cfg.path not in known_models.WAN:
            names = ", ".join(known_models.WAN)
            raise ValueError(f"{cfg.path} is neither a folder nor one of {names}")
        folder = self._new("generator")
        return replace(cfg, path=str(wan_folder(cfg.path, folder)))

    def rewards(self, rewards: Mapping[str, RewardConfig]) -> dict[str, RewardConfig]:
        """Replace rewards that are not on this machine."""
        from launch.planning.runs import is_descore
        from launch.rehearsal.model_folders import descore_folder

        done = {}
        for name, reward in rewards.items():
            there = reward.checkpoint is None or Path(reward.checkpoint).is_dir()
            if reward.url is None and there:
                done[name] = reward
            elif is_descore(name, reward):
                size = known_models.closest_qwen3_vl(reward.checkpoint or "")
                folder = descore_folder(size, self._new(f"reward-{name}"))
                done[name] = replace(reward, checkpoint=str(folder))
                self.notes.append(f"rewards.{name}: a DeScore on {size}")
            else:
                done[name] = replace(
                    reward, kind="brightness", url=None, checkpoint=None, options={}
                )
                self.notes.append(f"rewards.{name}: not rehearsed, brightness instead")
            if done[name].options.get("engine") == "vllm":
                builtin = {**reward.options, "engine": "builtin"}
                done[name] = replace(done[name], options=builtin)
                self.notes.append(f"rewards.{name}.options: {WITHOUT_VLLM}")
        return done

    # ------------------------------------------------------------------ data

    def prompts(self, path: str, count: int) -> str:
        """Return a file of ``count`` or more prompts: the run's where it is there."""
        if Path(path).is_file():
            return path
        file = self._new("prompts") / "prompts.txt"
        lines = [f"Boat {i} drifts down a gutter in the rain." for i in range(count)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.notes.append(f"{path}: {count} prompts instead")
        return str(file)

    def table(
        self, count: int, tokenizer: Path, *, masked: Collection[int] = ()
    ) -> str:
        """Write a table of ``count`` pairs of two videos, with chains of thought and scores.

        Those of the rows ``masked`` have a single word.
        """
        from launch.rehearsal.model_folders import text_of

        folder = self._new("table")
        videos = [str(file) for file in self.videos(folder, 2)]
        cot = text_of(tokenizer, COT_TOKENS)
        scores = {"subject": 1}
        answer = {"video_1_scores": scores, "video_2_scores": {"subject": 2}}
        row = {
            "videos": repr([Path(video).name for video in videos]),
            "CoT_A": cot,
            "CoT_B": cot,
            "answer": f"<answer>{json.dumps(answer)}</answer>",
        }
        rows = []
        for i in range(count):
            label = "B" if i % 2 else "A"
            rows.append({"prompt": f"Boat {i} drifts.", "GSB": label, **row})
            if i in masked:
                rows[-1].update(CoT_A="word", CoT_B="word")
        _write_csv(folder / "pairs.csv", rows)
        return str(folder / "pairs.csv")

    def videos(self, folder: Path, count: int) -> list[Path]:
        """Write videos of the published size, each of another grey."""
        import torch

        from common.video_io import write_mp4

        files = []
        for i in range(count):
            shape = (FRAMES, HEIGHT, WIDTH, 3)
            video_TYXC = torch.full(shape, 40 + 20 * i, dtype=torch.uint8)
            files.append(folder / f"{i:04d}.mp4")
            write_mp4(files[-1], video_TYXC, FPS)
        self.notes.append(f"videos of {FRAMES} frames, {HEIGHT} x {WIDTH}")
        return files

    def latent_pairs(self, cfg: GeneratorConfig, count: int) -> str:
        """Write a set of latent pairs of the generator's size."""
        import torch

        from alignment.pair_store import LatentPair, write_pairs
        from launch.planning.models import MetaWan

        wan = MetaWan(cfg)
        noise = torch.Generator().manual_seed(0)
        chosen = torch.randn(wan.latent_shape, generator=noise)
        width = wan.transformer.config.text_dim
        tokens = min(EMBEDDED_TOKENS, cfg.max_sequence_length)
        embedding = torch.randn(tokens, width, generator=noise)
        pair = LatentPair(
            "A boat drifts.", chosen, -chosen, embedding.to(torch.bfloat16)
        )
        folder = self._new("pairs")
        write_pairs(
            folder,
            iter([pair] * count),
            per_shard=8,
            dtype=torch.bfloat16,
            about={},
        )
        self.notes.append(f"{count} pairs of random latents")
        return str(folder)

    def _new(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True)
        return folder


def adapt(cfg: Any, folder: Path, ranks: int) -> Adapted:
    """Shorten a run of any kind to one unit on ``ranks`` ranks, with stand-ins in ``folder``.

    Raises ValueError where the ranks do not divide the batch, for a generator whose sizes are not
    known, and for a kind of run that cannot be rehearsed.
    """
    made = StandIns(folder, ranks)
    kinds: dict[type, Callable[[Any, StandIns], Adapted]] = {
        GrpoRun: _grpo,
        DpoRun: _dpo,
        PairsRun: _pairs,
        ColdStartRun: _cold_start,
        DualRlRun: _dual_rl,
        SampleRun: _sample,
        ScoreRun: _score,
        GeneratorEvaluation: _evaluate,
        ServeRun: _serve,
    }
    if type(cfg) not in kinds:
        raise ValueError(f"a {type(cfg).__name__} cannot be rehearsed")
    if hasattr(cfg, "generator"):
        check_wan(cfg.generator, "a rehearsal")
    adapted = kinds[type(cfg)](cfg, made)
    adapted.notes[:0] = made.notes
    return adapted


def _one_step(cfg: Any, made: StandIns, **changes: Any) -> Any:
    """A training run of one step, which is never saved."""
    return replace(
        cfg,
        run_dir=str(made.folder / "run"),
        save_every=1,
        wandb=replace(cfg.wandb, mode="disabled"),
        tensorboard=False,
        **changes,
    )


def _share(key: str, total: int, ranks: int) -> int:
    """How many of a batch a rank has. Raises ValueError unless the ranks divide it."""
    if total % ranks:
        raise ValueError(f"{ranks} ranks do not divide {key}={total}")
    return total // ranks


def _grpo(cfg: GrpoRun, made: StandIns) -> Adapted:
    shared = cfg.grpo.ranks_per_group
    groups = _share("prompts_per_step", cfg.prompts_per_step * shared, made.ranks)
    run = min(groups, MOST_GROUPS)
    per_step = run * made.ranks // shared
    cfg = _one_step(
        cfg,
        made,
        generator=made.generator(cfg.generator),
        rewards=made.rewards(cfg.rewards),
        prompts=made.prompts(cfg.prompts, per_step),
        prompts_per_step=per_step,
        steps=1,
        video_every=0,
        self_checks=False,
        diagnosis=None,
        evaluation=None,
    )
    left_out = "self-checks, diagnosis and evaluation: left out"
    return Adapted(cfg, "update", groups / run, [left_out])


def _dpo(cfg: DpoRun, made: StandIns) -> Adapted:
    share = _share("dpo.pairs_per_step", cfg.dpo.pairs_per_step, made.ranks)
    run = _part_of(share, cfg.dpo.micro_batch, MOST_PAIRS)
    generator = made.generator(cfg.generator)
    count = run * made.ranks
    notes = [] if cfg.refresh is None else ["refresh: left out"]
    cfg = _one_step(
        cfg,
        made,
        generator=generator,
        pairs=made.latent_pairs(generator, count),
        heldout=None,
        refresh=None,
        dpo=replace(cfg.dpo, pairs_per_step=count, epochs=1),
    )
    return Adapted(cfg, "update", share / run, notes)


def _part_of(share: int, micro_batch: int, most: int) -> int:
    """The largest number of whole micro-batches up to ``most`` items that divides a share."""
    sizes = range(micro_batch, share + 1, micro_batch)
    fitting = [n for n in sizes if share % n == 0 and n <= max(most, micro_batch)]
    return max(fitting, default=share)


def _cold_start(cfg: ColdStartRun, made: StandIns) -> Adapted:
    from launch.rehearsal.model_folders import qwen_folder
    from rm.data import PairSchedule

    how = cfg.cold_start
    share = _share("cold_start.pairs_per_step", how.pairs_per_step, made.ranks)
    run = _part_of(share, how.micro_batch, MOST_PAIRS)
    base = cfg.base
    checkpoint = cfg.checkpoint
    if checkpoint is not None:
        checkpoint = _descore(checkpoint, made)
    elif not Path(base).is_dir():
        base = str(qwen_folder(base, made._new("base")))
    folder = Path(checkpoint or base)
    count = run * made.ranks

    # Masking drops its share of rank 0's chains of thought, exactly.
    dropped = round(run * how.masking.probability)
    draws = PairSchedule(count, pairs_per_step=count, seed=cfg.seed).at(0)
    masked = [draw.row for draw in draws[:run]][run - dropped :]
    notes = [f"{dropped} of {run} pairs without their chains of thought"]
    cfg = _one_step(
        cfg,
        made,
        base=base,
        checkpoint=checkpoint,
        data=_data(cfg.data, made.table(count, folder, masked=masked)),
        cold_start=replace(
            how,
            pairs_per_step=count,
            epochs=1,
            masking=replace(how.masking, probability=0.0),
        ),
    )
    return Adapted(cfg, "update", share / run, notes)


def _descore(checkpoint: str, made: StandIns) -> str:
    """Folder of a checkpoint, or of a stand-in where there is none."""
    from launch.rehearsal.model_folders import descore_folder

    if Path(checkpoint).is_dir():
        return checkpoint
    size = known_models.closest_qwen3_vl(checkpoint)
    made.notes.append(f"checkpoint: a DeScore on {size}")
    return str(descore_folder(size, made._new("checkpoint")))


def _dual_rl(cfg: DualRlRun, made: StandIns) -> Adapted:
    how = cfg.dual_rl
    _share("dual_rl.pairs_per_update", how.pairs_per_update, made.ranks)
    updates = how.pairs_per_step // how.pairs_per_update
    # As many updates as fill a batch of chains of thought.
    videos = 2 * how.pairs_per_update // made.ranks
    filled = math.ceil((how.cot_batch or 0) / videos)
    run = min(updates, max(MOST_UPDATES, filled))
    checkpoint = _descore(cfg.checkpoint, made)
    if how.engine == "vllm":
        how = replace(how, engine="builtin")
        made.notes.append(f"dual_rl: {WITHOUT_VLLM}")
    count = run * how.pairs_per_update
    cfg = _one_step(
        cfg,
        made,
        checkpoint=checkpoint,
        data=_data(cfg.data, made.table(count, Path(checkpoint))),
        dual_rl=replace(how, pairs_per_step=count, steps=1),
    )
    return Adapted(cfg, "step", updates / run)


def _data(data: Any, table: str) -> Any:
    return replace(
        data, train=table, heldout=None, limit=None, layout="descore", videos=None
    )


def _pairs(cfg: PairsRun, made: StandIns) -> Adapted:
    if cfg.prompts is None:
        raise ValueError("pairs of a table cannot be rehearsed, those of prompts can")
    cfg = replace(
        cfg,
        out=str(made.folder / "out"),
        generator=made.generator(cfg.generator),
        rewards=made.rewards(cfg.rewards),
        prompts=made.prompts(cfg.prompts, made.ranks),
        adapter=_adapter(cfg.adapter, made),
    )
    return Adapted(cfg, "prompt")


def _sample(cfg: SampleRun, made: StandIns) -> Adapted:
    cfg = replace(
        cfg,
        out=str(made.folder / "out"),
        generator=made.generator(cfg.generator),
        prompts=made.prompts(cfg.prompts, made.ranks),
        adapter=_adapter(cfg.adapter, made),
    )
    return Adapted(cfg, "video")


def _evaluate(cfg: GeneratorEvaluation, made: StandIns) -> Adapted:
    cfg = replace(
        cfg,
        out=str(made.folder / "out"),
        generator=made.generator(cfg.generator),
        rewards=made.rewards(cfg.rewards),
        prompts=made.prompts(cfg.prompts, made.ranks * cfg.batch),
        adapter=_adapter(cfg.adapter, made),
    )
    return Adapted(cfg, f"batch of {cfg.batch}")


def _adapter(path: str | None, made: StandIns) -> str | None:
    if path is None or Path(path).is_dir():
        return path
    made.notes.append(f"adapter: {path} is not there, a new adapter instead")
    return None


def _score(cfg: ScoreRun, made: StandIns) -> Adapted:
    folder = made._new("videos")
    files = made.videos(folder, min(cfg.batch, SCORED_VIDEOS))
    rows = []
    for i in range(cfg.batch * made.ranks):
        # Equal files with other prompts are other videos.
        file = files[i % len(files)]
        rows.append({"video": file.name, "prompt": f"Boat {i} drifts."})
    _write_csv(folder / "videos.csv", rows)
    cfg = replace(cfg, rewards=made.rewards(cfg.rewards))
    flags = {
        "videos": None,
        "prompts": folder / "videos.csv",
        "out": made.folder / "out" / "scores.jsonl",
    }
    return Adapted(cfg, f"batch of {cfg.batch}", flags=flags)


def _serve(cfg: ServeRun, made: StandIns) -> Adapted:
    cfg = replace(cfg, rewards=made.rewards(cfg.rewards), host="127.0.0.1", wait_ms=0.0)
    return Adapted(cfg, f"request of {SCORED_VIDEOS} videos")


def _write_csv(file: Path, rows: list[dict[str, str]]) -> None:
    import csv

    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def request_videos(count: int) -> torch.Tensor:
    """Videos of a request to the reward server, (B, T, Y, X, 3)."""
    import torch

    return torch.zeros(count, FRAMES, HEIGHT, WIDTH, 3, dtype=torch.uint8)
