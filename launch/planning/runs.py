"""What a run will need, from its config alone: memory of one rank by part, FLOPs and seconds by phase, disk.

Every count is of one rank and, of phases, of one optimizer step (for pairs: of one prompt). Seconds are FLOPs over what
the device does at a stated share of its peak; where one token after the other is written, the bytes that each has to
read over the device's bandwidth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from alignment.dpo import steps_of
from launch.planning.forwards import samples_per_rollout, samples_per_update
from launch.planning.models import (
    Lengths,
    RewardModelOnMeta,
    Sizes,
    WanOnMeta,
    lengths_of,
    sizes_of,
)

if TYPE_CHECKING:
    from alignment.config import RewardConfig
    from generator.config import GeneratorConfig
    from launch.schemas.pairs import DpoRun, PairsRun
    from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun

GIB = 2.0**30


@dataclass(frozen=True)
class Device:
    """One accelerator: memory in bytes, dense FLOP/s in bfloat16 and in what fp32 convolutions use, bytes a second."""

    name: str
    memory: float
    flops: float
    flops_fp32: float
    bandwidth: float


DEVICES = {  # the makers' data sheets: dense, without sparsity
    "h100": Device("H100 SXM 80 GB", 79.6 * GIB, 989e12, 494e12, 3.35e12),
    "h200": Device("H200 SXM 141 GB", 140.4 * GIB, 989e12, 494e12, 4.8e12),
    "a100": Device("A100 SXM 80 GB", 79.3 * GIB, 312e12, 156e12, 2.04e12),
    "4090": Device("RTX 4090 24 GB", 23.6 * GIB, 165e12, 83e12, 1.01e12),
}
RESERVE = (
    4 * GIB
)  # of the driver, the communication library, and what lies between allocated blocks: a guess


@dataclass(frozen=True)
class Where:
    """ranks of ``device``; ``utilisation`` is the share of its peak that the models reach."""

    device: Device
    ranks: int = 1
    utilisation: float = 0.5


@dataclass(frozen=True)
class Part:
    """Bytes on one rank. ``passing``: only while its phase runs, so that of all such parts the largest counts. What
    makes a part smaller is told by its name, in `launch.planning.advice`.
    """

    name: str
    bytes: float
    passing: bool = False


@dataclass(frozen=True)
class Phase:
    """FLOPs and seconds on one rank."""

    name: str
    flops: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """facts are lines for people; ``unit`` is what the phases are of, and ``count`` how many of them a rank does;
    ``assumed`` says which models are not there, and which are planned instead.
    """

    facts: list[str]
    parts: list[Part]
    phases: list[Phase]
    unit: str
    count: int
    disk: float
    problems: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    @property
    def staying(self) -> float:
        """Bytes: what stays, and the reserve."""
        return sum(part.bytes for part in self.parts if not part.passing) + RESERVE

    @property
    def peak(self) -> float:
        """Bytes: what stays, the reserve, and the largest of what passes."""
        return self.staying + max(
            (part.bytes for part in self.parts if part.passing), default=0.0
        )

    @property
    def seconds(self) -> float:
        """Of one unit."""
        return sum(phase.seconds for phase in self.phases)


def training_parts(
    name: str, sizes: Sizes, *, zero_stage: int, ranks: int
) -> list[Part]:
    """Weights, gradients and optimizer of a model under ZeRO: fp32 masters, exp_avg and exp_avg_sq take 12 bytes a
    trained parameter (8 in ZeRO 0, whose masters are the weights), and stage 1 splits them over ranks, stage 2 the
    gradients too, stage 3 the weights. An optimizer's step takes an fp32 gradient and two copies more.
    """
    over = {stage: ranks if zero_stage >= stage else 1 for stage in (1, 2, 3)}
    return [
        Part(f"{name}: weights", sizes.bytes / over[3]),
        Part(f"{name}: gradients", sizes.trained_bytes / over[2]),
        Part(
            f"{name}: optimizer",
            (12.0 if zero_stage else 8.0) * sizes.trained / over[1],
        ),
        Part(f"{name}: optimizer's step", 12.0 * sizes.trained / over[1], passing=True),
    ]


def at(where: Where, flops: float) -> float:
    return flops / (where.utilisation * where.device.flops)


def plan_grpo(cfg: GrpoRun, where: Where) -> Plan:
    """Sample, decode, judge, update; how many forwards that takes is in `launch.planning.forwards`."""
    how, wan = cfg.generator.sampler, WanOnMeta(cfg.generator)
    members, shared = cfg.grpo.group_size, cfg.grpo.ranks_per_group
    groups, rest = divmod(cfg.prompts_per_step * shared, where.ranks)
    sizes = sizes_of(wan.module)
    branches = 1 if how.guidance_scale == 1 else 2
    own = members // shared
    at_once = min(cfg.generator.rollout_batch or own, own) * branches
    rollout = wan.forward(at_once, grad=False)
    each = rollout.flops / at_once
    rolled = groups * samples_per_rollout(how, own)
    latents = samples_per_update(cfg)
    in_update = branches if cfg.generator.guidance_in_update else 1
    update = wan.forward(in_update, grad=True)
    trained = groups * latents * cfg.grpo.updates * update.flops
    compared = groups * latents * in_update * each if cfg.grpo.kl_weight else 0.0
    decoding, pixels = _decoding(wan, groups * own, own, where)

    parts = training_parts(
        "transformer", sizes, zero_stage=cfg.zero_stage, ranks=where.ranks
    )
    parts += [_vae(wan), *_text_encoder(cfg.generator, wan, cached=cfg.cache_prompts)]
    if cfg.ema is not None:
        parts.append(Part("average of the trained weights", 4.0 * sizes.trained))
    if cfg.generator.lora is None and cfg.grpo.kl_weight:
        parts.append(Part("frozen copy for KL", float(sizes.bytes)))
    parts += [
        Part("rollout: activations", rollout.peak, passing=True),
        decoding,
        Part("update: activations", update.peak, passing=True),
    ]
    phases = [
        Phase("rollout", rolled * each, at(where, rolled * each)),
        pixels,
        Phase("update", trained + compared, at(where, trained + compared)),
    ]
    judges = _judges(cfg.rewards, groups * own, own, where, cfg.generator)
    saved = _saved(sizes) * (cfg.keep + 1)
    facts = [
        *_facts_of_wan(wan, sizes),
        f"one update = {cfg.prompts_per_step} prompts x {members} = {cfg.prompts_per_step * members} videos; a rank "
        f"rolls out {groups} groups with {rolled:,.0f} DiT forwards and updates along {groups * latents:g} latents",
        *judges.facts,
    ]
    problems = (
        [
            f"prompts_per_step={cfg.prompts_per_step} x {shared} ranks a group over {where.ranks}"
        ]
        if rest
        else []
    )
    parts, phases = [*parts, *judges.parts], [*phases, *judges.phases]
    return Plan(
        facts, parts, phases, "update", cfg.steps, saved, problems, judges.assumed
    )


def plan_dpo(cfg: DpoRun, where: Where, *, pairs: int | None = None) -> Plan:
    """``pairs`` is how many there are; None says nothing of the whole run."""
    wan, each = WanOnMeta(cfg.generator), cfg.dpo.micro_batch
    own, rest = divmod(cfg.dpo.pairs_per_step, where.ranks)
    sizes = sizes_of(wan.module)
    samples = each * (1 if cfg.dpo.method == "sft" else 2)
    update = wan.forward(samples, grad=True)
    reference = wan.forward(samples, grad=False) if cfg.dpo.method == "dpo" else None
    flops = own / each * (update.flops + (reference.flops if reference else 0.0))
    parts = training_parts(
        "transformer", sizes, zero_stage=cfg.zero_stage, ranks=where.ranks
    )
    parts.append(Part("update: activations", update.peak, passing=True))
    facts = [
        *_facts_of_wan(wan, sizes),
        f"one update = {cfg.dpo.pairs_per_step} pairs, {own} a rank; neither VAE nor text encoder is in memory",
    ]
    count = steps_of(cfg.dpo, pairs) if pairs else 0
    problems = (
        [f"pairs_per_step={cfg.dpo.pairs_per_step} over {where.ranks} ranks"]
        if rest
        else []
    )
    phases = [Phase("update", flops, at(where, flops))]
    return Plan(
        facts, parts, phases, "update", count, _saved(sizes) * (cfg.keep + 1), problems
    )


def plan_pairs(cfg: PairsRun, where: Where) -> Plan:
    """Of one prompt with all its candidates."""
    wan, how, count = (
        WanOnMeta(cfg.generator),
        cfg.generator.sampler,
        cfg.pairs.candidates,
    )
    branches = 1 if how.guidance_scale == 1 else 2
    at_once = min(cfg.generator.rollout_batch or count, count) * branches
    forward = wan.forward(at_once, grad=False)
    flops = count * how.num_steps * branches * forward.flops / at_once
    decoding, pixels = _decoding(wan, count, count, where)
    sizes = sizes_of(wan.transformer)
    judges = _judges(cfg.rewards, count, count, where, cfg.generator)
    parts = [
        Part("transformer: weights", float(sizes.bytes)),
        _vae(wan),
        *_text_encoder(cfg.generator, wan, cached=False),
        Part("sampling: activations", forward.peak, passing=True),
        decoding,
        *judges.parts,
    ]
    phases = [Phase("sampling", flops, at(where, flops)), pixels, *judges.phases]
    disk = (
        2.0 * math.prod(wan.latent_shape) * (2 if cfg.latent_dtype == "bfloat16" else 4)
    )
    facts = [
        *_facts_of_wan(wan, sizes),
        f"{count} candidates a prompt; one pair takes {disk / 1e6:.1f} MB",
        *judges.facts,
    ]
    own, disk = -(-(cfg.limit or 0) // where.ranks), disk * (cfg.limit or 1)
    return Plan(facts, parts, phases, "prompt", own, disk, assumed=judges.assumed)


def plan_reward_model(
    cfg: ColdStartRun | DualRlRun, where: Where, lengths: Lengths | None = None
) -> Plan:
    """DeScore's two stages on pairs of five-second videos of 480 x 832, or of ``lengths``."""
    from launch.schemas.training import ColdStartRun

    name = cfg.base if isinstance(cfg, ColdStartRun) else cfg.checkpoint
    settings = cfg.video if isinstance(cfg, ColdStartRun) else None
    judge = RewardModelOnMeta(name, dtype=cfg.dtype, settings=settings)
    judge.train(cfg.lr, cfg.lora, checkpointing=cfg.gradient_checkpointing)
    lengths = lengths or lengths_of(
        judge.settings, frames=81, fps=16.0, height=480, width=832
    )
    assumed = _assumed(
        "base" if isinstance(cfg, ColdStartRun) else "checkpoint", name, judge
    )
    sizes = sizes_of(judge.model)
    parts = training_parts("judge", sizes, zero_stage=cfg.zero_stage, ranks=where.ranks)
    facts = [
        f"{judge.name}: {sizes.trained:,} of {sizes.parameters:,} parameters are trained",
        f"a video is {lengths.video} tokens, its prompt about {lengths.prompt}, a chain about {lengths.chain}",
    ]
    if isinstance(cfg, ColdStartRun):
        return replace(
            _cold_start(cfg, where, judge, lengths, parts, facts), assumed=assumed
        )
    return replace(_dual_rl(cfg, where, judge, lengths, parts, facts), assumed=assumed)


def _cold_start(
    cfg: ColdStartRun,
    where: Where,
    judge: RewardModelOnMeta,
    lengths: Lengths,
    parts: list[Part],
    facts: list[str],
) -> Plan:
    how = cfg.cold_start
    own, rest = divmod(how.pairs_per_step, where.ranks)
    cost = judge.read(2 * how.micro_batch, lengths, places=lengths.whole, grad=True)
    flops = own / how.micro_batch * cost.flops
    parts = [*parts, Part("update: activations", cost.peak, passing=True)]
    facts = [*facts, f"one update = {how.pairs_per_step} pairs, {own} a rank"]
    problems = (
        [f"pairs_per_step={how.pairs_per_step} over {where.ranks} ranks"]
        if rest
        else []
    )
    saved = _saved(sizes_of(judge.model)) * cfg.keep + sizes_of(judge.model).bytes
    return Plan(
        facts,
        parts,
        [Phase("update", flops, at(where, flops))],
        "update",
        0,
        saved,
        problems,
    )


def _dual_rl(
    cfg: DualRlRun,
    where: Where,
    judge: RewardModelOnMeta,
    lengths: Lengths,
    parts: list[Part],
    facts: list[str],
) -> Plan:
    how, sizes = cfg.dual_rl, sizes_of(judge.model)
    own, rest = divmod(how.pairs_per_step, where.ranks)
    chains, row = how.group_size, how.cots_per_row or how.group_size
    rows = 2 * own * chains // row
    places = lengths.video + lengths.prompt + row * lengths.chain
    update = judge.read(2 * how.micro_batch, lengths, places=places, grad=True)
    compared = judge.read(2 * how.micro_batch, lengths, places=places, grad=False)
    prefill = judge.read(1, lengths, places=lengths.video + lengths.prompt, grad=False)
    flops = (
        rows
        / (2 * how.micro_batch)
        * (update.flops + (2 if how.kl_weight else 1) * compared.flops)
    )
    written = 2 * own * chains * lengths.chain
    wrote = 2 * own * prefill.flops + 2.0 * judge.language.parameters * written
    reading = 2 * own * lengths.chain * judge.language.bytes / where.device.bandwidth
    if cfg.lora is None and how.kl_weight:
        copies = where.ranks if cfg.zero_stage == 3 else 1
        parts = [*parts, Part("frozen copy for KL", sizes.bytes / copies)]
    parts = [
        *parts,
        Part(
            "chains: keys and values",
            chains * judge.cache_bytes(lengths.whole),
            passing=True,
        ),
        Part("update: activations", update.peak, passing=True),
    ]
    facts = [
        *facts,
        f"one step = {how.pairs_per_step} pairs x 2 videos x {chains} chains, {own} pairs a rank, "
        f"{how.pairs_per_step // how.pairs_per_update} optimizer steps; rows of {places:,} places",
    ]
    phases = [
        Phase("chains of thought", wrote, max(at(where, wrote), reading)),
        Phase("update", flops, at(where, flops)),
    ]
    problems = (
        [f"pairs_per_step={how.pairs_per_step} over {where.ranks} ranks"]
        if rest
        else []
    )
    return Plan(
        facts,
        parts,
        phases,
        "step",
        how.steps,
        _saved(sizes) * cfg.keep + sizes.bytes,
        problems,
    )


@dataclass(frozen=True)
class _Judges:
    """What the rewards add to a `Plan`, by its names."""

    parts: list[Part] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)


def _judges(
    rewards: dict[str, RewardConfig],
    videos: int,
    at_once: int,
    where: Where,
    how: GeneratorConfig,
) -> _Judges:
    """The rewards that are DeScores; of others nothing is known here."""
    found = _Judges()
    for name, reward in rewards.items():
        if not is_descore(name, reward):
            found.facts.append(f"reward {name}: not counted")
            continue
        judge = RewardModelOnMeta(reward.checkpoint or "", dtype="bfloat16")
        found.assumed.extend(
            _assumed(f"rewards.{name}.checkpoint", reward.checkpoint, judge)
        )
        batch = judged_at_once(reward, at_once)
        lengths = lengths_of(
            judge.settings,
            frames=how.num_frames,
            fps=how.fps,
            height=how.height,
            width=how.width,
        )
        cost = judge.read(
            batch, lengths, places=lengths.video + lengths.prompt, grad=False
        )
        flops = videos * (
            cost.flops / batch + 2.0 * judge.language.parameters * lengths.chain
        )
        reading = (
            videos
            / batch
            * lengths.chain
            * judge.language.bytes
            / where.device.bandwidth
        )
        found.phases.append(
            Phase(f"reward {name}", flops, max(at(where, flops), reading))
        )
        found.parts.append(
            Part(f"reward {name}: weights", float(sizes_of(judge.model).bytes))
        )
        cache = batch * judge.cache_bytes(lengths.whole)
        found.parts.append(
            Part(f"reward {name}: activations, cache", cost.peak + cache, passing=True)
        )
    return found


def is_descore(name: str, reward: RewardConfig) -> bool:
    """A DeScore in this process."""
    return (reward.kind or name) == "descore" and not reward.target and not reward.url


def judged_at_once(reward: RewardConfig, videos: int) -> int:
    """Of ``videos``, with the default of `rm.scorer.DeScoreScorer`."""
    return min(int(reward.options.get("batch", 32)), videos)


def _assumed(key: str, given: str | None, judge: RewardModelOnMeta) -> list[str]:
    """A line where another model is planned than the one that is named."""
    if judge.name == given:
        return []
    return [
        f"{key}: {given or 'nothing'} is neither a folder nor a known model, planned as {judge.name}"
    ]


def _decoding(
    wan: WanOnMeta, videos: int, at_once: int, where: Where
) -> tuple[Part, Phase]:
    """``decode_batch`` at a time, or ``at_once``, in fp32."""
    batch = wan.cfg.decode_batch or at_once
    cost = wan.decode(batch)
    flops = videos * cost.flops / batch
    return (
        Part("decoding: activations", cost.peak, passing=True),
        Phase("decoding", flops, flops / (where.utilisation * where.device.flops_fp32)),
    )


def _vae(wan: WanOnMeta) -> Part:
    return Part("VAE: weights", 4.0 * sizes_of(wan.vae).parameters)


def _text_encoder(cfg: GeneratorConfig, wan: WanOnMeta, *, cached: bool) -> list[Part]:
    if cached:
        return []
    return [Part("text encoder: weights", float(sizes_of(wan.text_encoder).bytes))]


def _facts_of_wan(wan: WanOnMeta, sizes: Sizes) -> list[str]:
    cfg = wan.cfg
    return [
        f"{cfg.path}: {sizes.trained:,} of {sizes.parameters:,} parameters are trained",
        f"a video of {cfg.num_frames} frames of {cfg.height} x {cfg.width} is {wan.tokens:,} tokens",
    ]


def _saved(sizes: Sizes) -> float:
    """A checkpoint: fp32 weights, two moments, and the weights once more as people load them."""
    return 16.0 * sizes.trained
