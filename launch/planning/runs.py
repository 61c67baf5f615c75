"""Plan each kind of run from its config alone.

Every count is that of a rank and, of phases, of one optimizer step (for pairs: of one prompt).
Seconds are FLOPs over a stated share of the device's peak. Where tokens are written one after the
other, the weights that each of them reads set the time if they take longer.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.dpo import steps_of
from launch.planning.forwards import branches, samples_per_rollout, samples_per_update
from launch.planning.models import (
    Lengths,
    MetaRewardModel,
    MetaWan,
    Sizes,
    lengths_of,
    sizes_of,
)
from launch.planning.plan import Plan, Where, training_parts
from launch.schemas.pairs import DpoRun, PairsRun
from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun

if TYPE_CHECKING:
    from alignment.config import RewardConfig
    from generator.config import GeneratorConfig


def plan_of(cfg: Any, where: Where) -> Plan | None:
    """Plan a run of any kind; None for a kind that has no plan."""
    # The schema tells the kind.
    if isinstance(cfg, GrpoRun):
        return plan_grpo(cfg, where)
    if isinstance(cfg, DpoRun):
        return plan_dpo(cfg, where, pairs=_count_pairs(Path(cfg.pairs)))
    if isinstance(cfg, ColdStartRun | DualRlRun):
        return plan_reward_model(cfg, where)
    if isinstance(cfg, PairsRun) and cfg.prompts is not None:
        return plan_pairs(cfg, where)
    return None


def _count_pairs(folder: Path) -> int | None:
    from alignment.pair_store import MANIFEST, PairSet

    return len(PairSet(folder)) if (folder / MANIFEST).is_file() else None


def plan_grpo(cfg: GrpoRun, where: Where) -> Plan:
    """Plan an optimizer step of GRPO: rollout, decoding, rewards, update."""
    # What a rank does in a step.
    how = cfg.generator.sampler
    wan = MetaWan(cfg.generator)
    shared = cfg.grpo.ranks_per_group
    groups = cfg.prompts_per_step * shared // where.ranks
    members = cfg.grpo.group_size // shared
    guided = branches(how)

    # Rollout: forwards without gradient.
    batch = min(cfg.generator.rollout_batch or members, members) * guided
    rollout = wan.forward(batch, grad=False)
    sample_flops = rollout.flops / batch
    num_rolled = groups * samples_per_rollout(how, members)

    # Update: forwards with gradient, and the reference policy's for the KL.
    latents = samples_per_update(cfg)
    update_guided = guided if cfg.generator.guidance_in_update else 1
    update = wan.forward(update_guided, grad=True)
    update_flops = groups * latents * cfg.grpo.updates * update.flops
    if cfg.grpo.kl_weight:
        update_flops += groups * latents * update_guided * sample_flops

    # The training state.
    plan = _train_wan(cfg, where, wan, cfg.steps)
    plan.divide("prompts_per_step x ranks_per_group", cfg.prompts_per_step * shared)
    plan.facts.append(
        f"one update = {cfg.prompts_per_step} prompts x {cfg.grpo.group_size} = "
        f"{cfg.prompts_per_step * cfg.grpo.group_size} videos; a rank rolls out "
        f"{groups} groups with {num_rolled:,.0f} DiT forwards and updates along "
        f"{groups * latents:g} latents"
    )
    # What comes on top of it, in the order of a step.
    plan.phase("rollout", num_rolled * sample_flops)
    plan.add("rollout: activations", rollout.peak, temporary=True)
    videos = groups * members
    _add_decoding(plan, wan, videos, members, text_encoder=not cfg.cache_prompts)
    sizes = sizes_of(wan.module)
    if cfg.ema is not None:
        plan.add("average of the trained weights", 4.0 * sizes.trained)
    if cfg.generator.lora is None and cfg.grpo.kl_weight:
        plan.add("frozen copy for KL", sizes.bytes)
    plan.phase("update", update_flops)
    plan.add("update: activations", update.peak, temporary=True)
    _add_rewards(plan, cfg.rewards, videos, members, cfg.generator)
    return plan


def plan_dpo(
    cfg: DpoRun,
    where: Where,
    *,
    pairs: int | None = None,
) -> Plan:
    """Plan an optimizer step of Flow-DPO; ``pairs`` is the size of the set, None if unknown."""
    wan = MetaWan(cfg.generator)
    rank_pairs = cfg.dpo.pairs_per_step // where.ranks

    # The policy sees both videos of a pair, SFT only the chosen one; DPO adds the reference.
    samples = cfg.dpo.micro_batch * (1 if cfg.dpo.method == "sft" else 2)
    update = wan.forward(samples, grad=True)
    flops = update.flops
    if cfg.dpo.method == "dpo":
        flops += wan.forward(samples, grad=False).flops
    flops = rank_pairs / cfg.dpo.micro_batch * flops

    # Neither VAE nor text encoder: the latents and embeddings are saved.
    plan = _train_wan(cfg, where, wan, steps_of(cfg.dpo, pairs) if pairs else 0)
    plan.divide("pairs_per_step", cfg.dpo.pairs_per_step)
    plan.facts.append(
        f"one update = {cfg.dpo.pairs_per_step} pairs, {rank_pairs} a rank; "
        "neither VAE nor text encoder is in memory"
    )
    plan.phase("update", flops)
    plan.add("update: activations", update.peak, temporary=True)
    return plan


def plan_pairs(cfg: PairsRun, where: Where) -> Plan:
    """Plan the candidates of a prompt: sampling, decoding, rewards."""
    # Sampling: every step of every candidate.
    wan = MetaWan(cfg.generator)
    how = cfg.generator.sampler
    count = cfg.pairs.candidates
    guided = branches(how)
    batch = min(cfg.generator.rollout_batch or count, count) * guided
    forward = wan.forward(batch, grad=False)
    flops = count * how.num_steps * guided * forward.flops / batch

    # A pair is two latents.
    bytes_per_value = 2 if cfg.latent_dtype == "bfloat16" else 4
    pair_bytes = 2.0 * math.prod(wan.latent_shape) * bytes_per_value
    disk = pair_bytes * (cfg.limit or 1)
    plan = Plan(where, "prompt", -(-(cfg.limit or 0) // where.ranks), disk)
    plan.facts += _wan_facts(wan)
    plan.facts.append(
        f"{count} candidates a prompt; one pair takes {pair_bytes / 1e6:.1f} MB"
    )

    # Nothing is trained: weights alone.
    plan.add("transformer: weights", sizes_of(wan.module).bytes)
    plan.phase("sampling", flops)
    plan.add("sampling: activations", forward.peak, temporary=True)
    _add_decoding(plan, wan, count, count, text_encoder=True)
    _add_rewards(plan, cfg.rewards, count, count, cfg.generator)
    return plan


def plan_reward_model(
    cfg: ColdStartRun | DualRlRun,
    where: Where,
    lengths: Lengths | None = None,
) -> Plan:
    """Plan a stage of DeScore on pairs of videos of ``lengths``.

    None stands for five seconds of 480 x 832.
    """
    from launch.schemas.training import ColdStartRun

    # The model that is trained.
    cold_start = isinstance(cfg, ColdStartRun)
    key = "base" if cold_start else "checkpoint"
    name = getattr(cfg, key)
    settings = cfg.video if cold_start else None
    model = MetaRewardModel(name, dtype=cfg.dtype, settings=settings)
    model.train(cfg.lr, cfg.lora, checkpointing=cfg.gradient_checkpointing)
    sizes = sizes_of(model.model)
    # Five seconds at 16 frames a second.
    if lengths is None:
        lengths = lengths_of(
            model.settings,
            frames=81,
            fps=16.0,
            height=480,
            width=832,
        )

    # What both stages need.
    disk = _checkpoint_bytes(sizes) * cfg.keep + sizes.bytes
    unit, count = ("update", 0) if cold_start else ("step", cfg.dual_rl.steps)
    plan = Plan(where, unit, count, disk)
    plan.parts += training_parts(
        "reward model",
        sizes,
        zero_stage=cfg.zero_stage,
        ranks=where.ranks,
    )
    plan.facts += [
        f"{model.name}: {sizes.trained:,} of {sizes.parameters:,} parameters are trained",
        f"a video is {lengths.video} tokens, its prompt about {lengths.prompt}, "
        f"a chain of thought about {lengths.chain}",
    ]
    _note_assumed(plan, key, name, model)
    # What each stage adds.
    if cold_start:
        _add_cold_start(plan, cfg, model, lengths)
    else:
        _add_dual_rl(plan, cfg, model, lengths)
    return plan


def _add_cold_start(
    plan: Plan,
    cfg: ColdStartRun,
    model: MetaRewardModel,
    lengths: Lengths,
) -> None:
    """Add the Bradley-Terry update of stage 1."""
    how = cfg.cold_start
    plan.divide("pairs_per_step", how.pairs_per_step)
    # Both videos of a pair, each with its chain of thought.
    rank_pairs = how.pairs_per_step // plan.where.ranks
    cost = model.read(2 * how.micro_batch, lengths, places=lengths.total, grad=True)
    plan.phase("update", rank_pairs / how.micro_batch * cost.flops)
    plan.add("update: activations", cost.peak, temporary=True)
    plan.facts.append(f"one update = {how.pairs_per_step} pairs, {rank_pairs} a rank")


def _add_dual_rl(
    plan: Plan,
    cfg: DualRlRun,
    model: MetaRewardModel,
    lengths: Lengths,
) -> None:
    """Add the writing of chains of thought and the packed update of stage 2."""
    how = cfg.dual_rl
    plan.divide("pairs_per_step", how.pairs_per_step)
    rank_pairs = how.pairs_per_step // plan.where.ranks
    videos = 2 * rank_pairs

    # Update: rows of several chains of thought, old log-probabilities, and the reference's.
    cots_per_row = how.cots_per_row or how.group_size
    num_rows = videos * how.group_size // cots_per_row
    places = lengths.prefix + cots_per_row * lengths.chain
    batch = 2 * how.micro_batch
    update = model.read(batch, lengths, places=places, grad=True)
    compared = model.read(batch, lengths, places=places, grad=False)
    compared_flops = (2 if how.kl_weight else 1) * compared.flops

    # Writing: the prefix once a video, then every token of every chain of thought.
    prefill = model.read(1, lengths, places=lengths.prefix, grad=False)
    num_written = videos * how.group_size * lengths.chain
    write_flops = videos * prefill.flops + 2.0 * model.decoder.parameters * num_written
    # The weights are read again for every token, by all chains of thought of a video
    # together.
    read_bytes = videos * lengths.chain * model.decoder.bytes
    plan.phase("chains of thought", write_flops, read_bytes=read_bytes)
    plan.phase("update", num_rows / batch * (update.flops + compared_flops))

    # Memory besides the training state.
    if cfg.lora is None and how.kl_weight:
        shards = plan.where.ranks if cfg.zero_stage == 3 else 1
        plan.add("frozen copy for KL", sizes_of(model.model).bytes / shards)
    cache = how.group_size * model.cache_bytes(lengths.total)
    plan.add("chains of thought: keys and values", cache, temporary=True)
    plan.add("update: activations", update.peak, temporary=True)
    plan.facts.append(
        f"one step = {how.pairs_per_step} pairs x 2 videos x {how.group_size} chains of thought, "
        f"{rank_pairs} pairs a rank, {how.pairs_per_step // how.pairs_per_update} optimizer "
        f"steps; rows of {places:,} places"
    )


def _add_rewards(
    plan: Plan,
    rewards: dict[str, RewardConfig],
    videos: int,
    batch: int,
    how: GeneratorConfig,
) -> None:
    """Add the rewards that are a DeScore in this process; the cost of others is not known."""
    for name, reward in rewards.items():
        # Other rewards may run anywhere.
        if not is_descore(name, reward):
            plan.facts.append(f"reward {name}: not counted")
            continue
        model = MetaRewardModel(reward.checkpoint or "", dtype="bfloat16")
        _note_assumed(plan, f"rewards.{name}.checkpoint", reward.checkpoint, model)

        # The default batch is that of rm.scorer.DeScoreScorer.
        at_once = min(int(reward.options.get("batch", 32)), batch)
        lengths = lengths_of(
            model.settings,
            frames=how.num_frames,
            fps=how.fps,
            height=how.height,
            width=how.width,
        )
        cost = model.read(at_once, lengths, places=lengths.prefix, grad=False)
        # Reading the video, and then writing the chain of thought.
        written = 2.0 * model.decoder.parameters * lengths.chain
        flops = videos * (cost.flops / at_once + written)
        read_bytes = videos / at_once * lengths.chain * model.decoder.bytes
        plan.phase(f"reward {name}", flops, read_bytes=read_bytes)

        # The weights stay; keys and values go after each batch.
        plan.add(f"reward {name}: weights", sizes_of(model.model).bytes)
        activations = cost.peak + at_once * model.cache_bytes(lengths.total)
        plan.add(f"reward {name}: activations, cache", activations, temporary=True)


def _add_decoding(
    plan: Plan,
    wan: MetaWan,
    videos: int,
    at_once: int,
    *,
    text_encoder: bool,
) -> None:
    """Add the VAE, which decodes in fp32, and with ``text_encoder`` that of the prompts.

    A batch holds ``decode_batch`` videos, or ``at_once``.
    """
    # 4 bytes a parameter.
    plan.add("VAE: weights", 4.0 * sizes_of(wan.vae).parameters)
    if text_encoder:
        plan.add("text encoder: weights", sizes_of(wan.text_encoder).bytes)
    # null decodes all together.
    batch = wan.cfg.decode_batch or at_once
    cost = wan.decode(batch)
    flops = videos * cost.flops / batch
    plan.add("decoding: activations", cost.peak, temporary=True)
    plan.phase("decoding", flops, peak=plan.where.device.flops_fp32)


def is_descore(name: str, reward: RewardConfig) -> bool:
    """Whether a reward is a DeScore in this process."""
    return (reward.kind or name) == "descore" and not reward.target and not reward.url


def _note_assumed(
    plan: Plan,
    key: str,
    given: str | None,
    model: MetaRewardModel,
) -> None:
    """Note where the plan takes another model than the config names."""
    # The planned model has the given name where it exists.
    if model.name != given:
        plan.assumed.append(
            f"{key}: {given or 'nothing'} is neither a folder nor a known model, "
            f"planned as {model.name}"
        )


def _train_wan(
    cfg: GrpoRun | DpoRun,
    where: Where,
    wan: MetaWan,
    count: int,
) -> Plan:
    """Start the plan of ``count`` updates with the training state of the transformer."""
    sizes = sizes_of(wan.module)
    plan = Plan(where, "update", count, _checkpoint_bytes(sizes) * (cfg.keep + 1))
    plan.facts += _wan_facts(wan)
    plan.parts += training_parts(
        "transformer",
        sizes,
        zero_stage=cfg.zero_stage,
        ranks=where.ranks,
    )
    return plan


def _wan_facts(wan: MetaWan) -> list[str]:
    cfg = wan.cfg
    sizes = sizes_of(wan.module)
    return [
        f"{cfg.path}: {sizes.trained:,} of {sizes.parameters:,} parameters are trained",
        f"a video of {cfg.num_frames} frames of {cfg.height} x {cfg.width} "
        f"is {wan.tokens:,} tokens",
    ]


def _checkpoint_bytes(sizes: Sizes) -> float:
    """Bytes of a checkpoint: fp32 weights, two moments, and the exported weights."""
    return 16.0 * sizes.trained
