"""Plan each kind of run from its config alone.

Every count is that of a rank and, of phases, of one optimizer step (for pairs: of one prompt).
Seconds are FLOPs over a stated share of the device's peak. Where tokens are written one after the
other, the weights that each of them reads set the time if they take longer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from alignment.dpo import steps_of
from launch.planning.forwards import samples_per_rollout, samples_per_update
from launch.planning.models import (
    Lengths,
    MetaRewardModel,
    MetaWan,
    Sizes,
    lengths_of,
    sizes_of,
)
from launch.planning.plan import Part, Plan, Where, training_parts

if TYPE_CHECKING:
    from alignment.config import RewardConfig
    from generator.config import GeneratorConfig
    from launch.schemas.pairs import DpoRun, PairsRun
    from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun


def plan_grpo(cfg: GrpoRun, where: Where) -> Plan:
    """Plan an optimizer step of GRPO: rollout, decoding, rewards, update."""
    # What a rank does in a step.
    how = cfg.generator.sampler
    wan = MetaWan(cfg.generator)
    sizes = sizes_of(wan.module)
    shared = cfg.grpo.ranks_per_group
    groups = cfg.prompts_per_step * shared // where.ranks
    members = cfg.grpo.group_size // shared
    branches = _branches(cfg.generator)

    # Rollout: forwards without gradient.
    batch = min(cfg.generator.rollout_batch or members, members) * branches
    rollout = wan.forward(batch, grad=False)
    sample_flops = rollout.flops / batch
    num_rolled = groups * samples_per_rollout(how, members)

    # Update: forwards with gradient, and the reference policy's for the KL.
    latents = samples_per_update(cfg)
    update_branches = branches if cfg.generator.guidance_in_update else 1
    update = wan.forward(update_branches, grad=True)
    update_flops = groups * latents * cfg.grpo.updates * update.flops
    if cfg.grpo.kl_weight:
        update_flops += groups * latents * update_branches * sample_flops

    # The training state and the first phase.
    plan = Plan(
        facts=[
            *_wan_facts(wan, sizes),
            f"one update = {cfg.prompts_per_step} prompts x {cfg.grpo.group_size} = "
            f"{cfg.prompts_per_step * cfg.grpo.group_size} videos; a rank rolls out "
            f"{groups} groups with {num_rolled:,.0f} DiT forwards and updates along "
            f"{groups * latents:g} latents",
        ],
        parts=training_parts(
            "transformer",
            sizes,
            zero_stage=cfg.zero_stage,
            ranks=where.ranks,
        ),
        phases=[where.phase("rollout", num_rolled * sample_flops)],
        unit="update",
        count=cfg.steps,
        disk=_checkpoint_bytes(sizes) * (cfg.keep + 1),
        problems=_remainder(
            "prompts_per_step x ranks_per_group", cfg.prompts_per_step * shared, where
        ),
    )

    # Memory besides the training state.
    _add_frozen_wan(plan, wan, text_encoder=not cfg.cache_prompts)
    if cfg.ema is not None:
        plan.parts.append(Part("average of the trained weights", 4.0 * sizes.trained))
    if cfg.generator.lora is None and cfg.grpo.kl_weight:
        plan.parts.append(Part("frozen copy for KL", float(sizes.bytes)))
    plan.parts.append(Part("rollout: activations", rollout.peak, temporary=True))
    # The VAE decodes after the rollout; the update comes after it.
    _add_decoding(plan, wan, groups * members, members, where)
    plan.parts.append(Part("update: activations", update.peak, temporary=True))
    plan.phases.append(where.phase("update", update_flops))
    # Rewards are phases too.
    _add_rewards(plan, cfg.rewards, groups * members, members, where, cfg.generator)
    return plan


def plan_dpo(
    cfg: DpoRun,
    where: Where,
    *,
    pairs: int | None = None,
) -> Plan:
    """Plan an optimizer step of Flow-DPO; ``pairs`` is the size of the set, None if unknown."""
    wan = MetaWan(cfg.generator)
    sizes = sizes_of(wan.module)
    rank_pairs = cfg.dpo.pairs_per_step // where.ranks

    # The policy sees both videos of a pair, SFT only the chosen one; DPO adds the reference.
    samples = cfg.dpo.micro_batch * (1 if cfg.dpo.method == "sft" else 2)
    update = wan.forward(samples, grad=True)
    flops = update.flops
    if cfg.dpo.method == "dpo":
        flops += wan.forward(samples, grad=False).flops
    flops = rank_pairs / cfg.dpo.micro_batch * flops

    # Neither VAE nor text encoder: the latents and embeddings are saved.
    parts = training_parts(
        "transformer",
        sizes,
        zero_stage=cfg.zero_stage,
        ranks=where.ranks,
    )
    parts.append(Part("update: activations", update.peak, temporary=True))
    return Plan(
        facts=[
            *_wan_facts(wan, sizes),
            f"one update = {cfg.dpo.pairs_per_step} pairs, {rank_pairs} a rank; "
            "neither VAE nor text encoder is in memory",
        ],
        parts=parts,
        phases=[where.phase("update", flops)],
        unit="update",
        count=steps_of(cfg.dpo, pairs) if pairs else 0,
        disk=_checkpoint_bytes(sizes) * (cfg.keep + 1),
        problems=_remainder("pairs_per_step", cfg.dpo.pairs_per_step, where),
    )


def plan_pairs(cfg: PairsRun, where: Where) -> Plan:
    """Plan the candidates of a prompt: sampling, decoding, rewards."""
    # Sampling: every step of every candidate.
    wan = MetaWan(cfg.generator)
    sizes = sizes_of(wan.module)
    count = cfg.pairs.candidates
    branches = _branches(cfg.generator)
    batch = min(cfg.generator.rollout_batch or count, count) * branches
    forward = wan.forward(batch, grad=False)
    num_steps = cfg.generator.sampler.num_steps
    flops = count * num_steps * branches * forward.flops / batch

    # A pair is two latents.
    bytes_per_value = 2 if cfg.latent_dtype == "bfloat16" else 4
    pair_bytes = 2.0 * math.prod(wan.latent_shape) * bytes_per_value

    # Nothing is trained: weights alone.
    plan = Plan(
        facts=[
            *_wan_facts(wan, sizes),
            f"{count} candidates a prompt; one pair takes {pair_bytes / 1e6:.1f} MB",
        ],
        parts=[Part("transformer: weights", float(sizes.bytes))],
        phases=[where.phase("sampling", flops)],
        unit="prompt",
        count=-(-(cfg.limit or 0) // where.ranks),
        disk=pair_bytes * (cfg.limit or 1),
    )
    # What runs besides the transformer.
    _add_frozen_wan(plan, wan, text_encoder=True)
    plan.parts.append(Part("sampling: activations", forward.peak, temporary=True))
    _add_decoding(plan, wan, count, count, where)
    _add_rewards(plan, cfg.rewards, count, count, where, cfg.generator)
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
    model = MetaRewardModel(
        name,
        dtype=cfg.dtype,
        settings=cfg.video if cold_start else None,
    )
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
    pairs_per_step = (
        cfg.cold_start.pairs_per_step if cold_start else cfg.dual_rl.pairs_per_step
    )
    plan = Plan(
        facts=[
            f"{model.name}: {sizes.trained:,} of {sizes.parameters:,} parameters are trained",
            f"a video is {lengths.video} tokens, its prompt about {lengths.prompt}, "
            f"a chain of thought about {lengths.chain}",
        ],
        parts=training_parts(
            "reward model",
            sizes,
            zero_stage=cfg.zero_stage,
            ranks=where.ranks,
        ),
        phases=[],
        unit="update" if cold_start else "step",
        count=0 if cold_start else cfg.dual_rl.steps,
        disk=_checkpoint_bytes(sizes) * cfg.keep + sizes.bytes,
        problems=_remainder("pairs_per_step", pairs_per_step, where),
        assumed=_assumed(key, name, model),
    )
    # What each stage adds.
    if cold_start:
        _add_cold_start(plan, cfg, where, model, lengths)
    else:
        _add_dual_rl(plan, cfg, where, model, lengths)
    return plan


def _add_cold_start(
    plan: Plan,
    cfg: ColdStartRun,
    where: Where,
    model: MetaRewardModel,
    lengths: Lengths,
) -> None:
    """Add the Bradley-Terry update of stage 1."""
    how = cfg.cold_start
    # Both videos of a pair, each with its chain of thought.
    rank_pairs = how.pairs_per_step // where.ranks
    cost = model.read(2 * how.micro_batch, lengths, places=lengths.total, grad=True)
    plan.parts.append(Part("update: activations", cost.peak, temporary=True))
    flops = rank_pairs / how.micro_batch * cost.flops
    plan.phases.append(where.phase("update", flops))
    plan.facts.append(f"one update = {how.pairs_per_step} pairs, {rank_pairs} a rank")


def _add_dual_rl(
    plan: Plan,
    cfg: DualRlRun,
    where: Where,
    model: MetaRewardModel,
    lengths: Lengths,
) -> None:
    """Add the writing of chains of thought and the packed update of stage 2."""
    how = cfg.dual_rl
    sizes = sizes_of(model.model)
    rank_pairs = how.pairs_per_step // where.ranks

    # Update: rows of several chains of thought, old log-probabilities, and the reference's.
    cots_per_row = how.cots_per_row or how.group_size
    num_rows = 2 * rank_pairs * how.group_size // cots_per_row
    places = lengths.prefix + cots_per_row * lengths.chain
    update = model.read(2 * how.micro_batch, lengths, places=places, grad=True)
    compared = model.read(2 * how.micro_batch, lengths, places=places, grad=False)
    compared_flops = (2 if how.kl_weight else 1) * compared.flops
    update_flops = num_rows / (2 * how.micro_batch) * (update.flops + compared_flops)

    # Writing: the prefix once a video, then every token of every chain of thought.
    prefill = model.read(1, lengths, places=lengths.prefix, grad=False)
    num_written = 2 * rank_pairs * how.group_size * lengths.chain
    write_flops = (
        2 * rank_pairs * prefill.flops + 2.0 * model.decoder.parameters * num_written
    )
    read_bytes = 2 * rank_pairs * lengths.chain * model.decoder.bytes
    # The weights are read again for every token, by all chains of thought of a video
    # together.
    plan.phases.extend(
        [
            where.phase("chains of thought", write_flops, read_bytes=read_bytes),
            where.phase("update", update_flops),
        ]
    )

    # Memory besides the training state.
    if cfg.lora is None and how.kl_weight:
        shards = where.ranks if cfg.zero_stage == 3 else 1
        plan.parts.append(Part("frozen copy for KL", sizes.bytes / shards))
    cache = how.group_size * model.cache_bytes(lengths.total)
    plan.parts.extend(
        [
            Part("chains of thought: keys and values", cache, temporary=True),
            Part("update: activations", update.peak, temporary=True),
        ]
    )
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
    where: Where,
    how: GeneratorConfig,
) -> None:
    """Add the rewards that are a DeScore in this process; the cost of others is not known."""
    for name, reward in rewards.items():
        # Other rewards may run anywhere.
        if not is_descore(name, reward):
            plan.facts.append(f"reward {name}: not counted")
            continue
        model = MetaRewardModel(reward.checkpoint or "", dtype="bfloat16")
        key = f"rewards.{name}.checkpoint"
        plan.assumed.extend(_assumed(key, reward.checkpoint, model))

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
        plan.phases.append(where.phase(f"reward {name}", flops, read_bytes=read_bytes))

        # The weights stay; keys and values go after each batch.
        weights = float(sizes_of(model.model).bytes)
        activations = cost.peak + at_once * model.cache_bytes(lengths.total)
        plan.parts.extend(
            [
                Part(f"reward {name}: weights", weights),
                Part(f"reward {name}: activations, cache", activations, temporary=True),
            ]
        )


def _add_frozen_wan(
    plan: Plan,
    wan: MetaWan,
    *,
    text_encoder: bool,
) -> None:
    """Add the weights of the VAE, in fp32, and of the text encoder."""
    # 4 bytes a parameter.
    plan.parts.append(Part("VAE: weights", 4.0 * sizes_of(wan.vae).parameters))
    # Cached prompts need no text encoder.
    if text_encoder:
        weights = float(sizes_of(wan.text_encoder).bytes)
        plan.parts.append(Part("text encoder: weights", weights))


def _add_decoding(
    plan: Plan,
    wan: MetaWan,
    videos: int,
    at_once: int,
    where: Where,
) -> None:
    """Add the decoding of ``videos``, ``decode_batch`` or ``at_once`` in a batch, in fp32."""
    # null decodes all together.
    batch = wan.cfg.decode_batch or at_once
    cost = wan.decode(batch)
    flops = videos * cost.flops / batch
    plan.parts.append(Part("decoding: activations", cost.peak, temporary=True))
    plan.phases.append(where.phase("decoding", flops, peak=where.device.flops_fp32))


def is_descore(name: str, reward: RewardConfig) -> bool:
    """Whether a reward is a DeScore in this process."""
    return (reward.kind or name) == "descore" and not reward.target and not reward.url


def _assumed(
    key: str,
    given: str | None,
    model: MetaRewardModel,
) -> list[str]:
    """Say where the plan takes another model than the config names."""
    # The planned model has the given name where it exists.
    if model.name == given:
        return []
    return [
        f"{key}: {given or 'nothing'} is neither a folder nor a known model, "
        f"planned as {model.name}"
    ]


def _remainder(
    key: str,
    count: int,
    where: Where,
) -> list[str]:
    """Say where the ranks do not divide the batch."""
    if count % where.ranks == 0:
        return []
    return [f"{where.ranks} ranks do not divide {key}={count}"]


def _branches(cfg: GeneratorConfig) -> int:
    """Forwards of a sample: with guidance also that of the negative prompt."""
    return 1 if cfg.sampler.guidance_scale == 1 else 2


def _wan_facts(wan: MetaWan, sizes: Sizes) -> list[str]:
    cfg = wan.cfg
    return [
        f"{cfg.path}: {sizes.trained:,} of {sizes.parameters:,} parameters are trained",
        f"a video of {cfg.num_frames} frames of {cfg.height} x {cfg.width} "
        f"is {wan.tokens:,} tokens",
    ]


def _checkpoint_bytes(sizes: Sizes) -> float:
    """Bytes of a checkpoint: fp32 weights, two moments, and the exported weights."""
    return 16.0 * sizes.trained
