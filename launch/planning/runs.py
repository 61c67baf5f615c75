"""Plan each kind of run from its config alone.

Every count is that of a rank and, of phases, of one optimizer step (for pairs: of one prompt).
Seconds are those of the kernels by their roofline: each call is made once on the simulated GPU of
``--rehearse``, and multiplied by how often a unit makes it. Communication is not counted.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.dpo import steps_of
from generator.experts import check_stochastic_steps as check_steps
from generator.experts import check_training
from launch.planning.forwards import (
    forwards_per_update,
    samples_per_rollout,
    samples_per_update,
)
from launch.planning.meter import Cost, Meter
from launch.planning.models import (
    Lengths,
    MetaRewardModel,
    MetaWan,
    Sizes,
    lengths_of,
    sizes_of,
)
from launch.planning.plan import REDUCE_BUCKET, Plan, Where, training_parts
from launch.planning.vllm import add_vllm
from launch.schemas.pairs import DpoRun, PairsRun
from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun

# CLIP ViT-H/14's vision model, as Wan 2.1 I2V reads it.
CLIP_PARAMETERS = 630_766_080

if TYPE_CHECKING:
    from collections.abc import Mapping

    from alignment.config import RewardConfig
    from generator.config import GeneratorConfig
    from rm.config import Generation


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
    shared = cfg.grpo.ranks_per_group
    together = cfg.generator.context_parallel
    shards = where.ranks // (shared * together)
    groups = cfg.prompts_per_step // max(1, shards)
    members = cfg.grpo.group_size // shared
    # Of ranks that share every sample, each decodes and scores its part of the groups.
    videos = math.ceil(groups / together) * members

    with _meter(where, cfg.generator) as meter:
        wan = MetaWan(cfg.generator, meter)
        plan = _train_wan(cfg, where, wan, cfg.steps)
        plan.divide(
            "prompts_per_step x ranks_per_group",
            cfg.prompts_per_step * shared * together,
        )
        plan.facts.append(
            f"one update = {cfg.prompts_per_step} prompts x {cfg.grpo.group_size} = "
            f"{cfg.prompts_per_step * cfg.grpo.group_size} videos; a rank rolls out "
            f"{groups} groups with {groups * samples_per_rollout(how, members):,.0f} DiT "
            f"forwards and updates along {groups * samples_per_update(cfg):g} latents, which "
            f"are {groups * forwards_per_update(cfg):,} forwards with a backward as two"
        )

        # The phases of a step.
        check_steps(cfg.generator, wan.family)
        check_training(cfg.generator, wan.family, zero_stage=cfg.zero_stage)
        rollout = _shared(wan.rollout(members), together) * groups
        plan.phase("rollout", _with_frozen(plan, wan, rollout))
        _add_decoding(plan, wan, videos, text_encoder=not cfg.cache_prompts)
        update = _shared(wan.update(cfg, members), together)
        plan.phase("update", update * (groups * cfg.grpo.updates))

        # What else is in memory.
        sizes = sizes_of(wan.module)
        if cfg.grpo.has_old_policy:
            plan.add("old policy", 4.0 * sizes.trained)
        if cfg.ema is not None:
            plan.add("average of the trained weights", 4.0 * sizes.trained)
        if cfg.generator.lora is None and cfg.grpo.kl_weight:
            plan.add("frozen copy for KL", sizes.bytes)
        at_once = max(members, min(videos, cfg.grpo.videos_per_call))
        _add_rewards(plan, meter, cfg.rewards, videos, at_once, cfg.generator)
        plan.hold(
            "frames of the videos that are scored together",
            at_once * _frames(cfg.generator),
        )
    return plan


def plan_dpo(
    cfg: DpoRun,
    where: Where,
    *,
    pairs: int | None = None,
) -> Plan:
    """Plan an optimizer step of Flow-DPO; ``pairs`` is the size of the set, None if unknown."""
    together = cfg.generator.context_parallel
    rank_pairs = cfg.dpo.pairs_per_step * together // where.ranks
    # The policy sees both videos of a pair, SFT only the chosen one; DPO adds the reference.
    samples = cfg.dpo.micro_batch * (1 if cfg.dpo.method == "sft" else 2)

    with _meter(where, cfg.generator) as meter:
        wan = MetaWan(cfg.generator, meter)
        # Neither VAE nor text encoder: the latents and embeddings are saved.
        plan = _train_wan(cfg, where, wan, steps_of(cfg.dpo, pairs) if pairs else 0)
        plan.divide("pairs_per_step", cfg.dpo.pairs_per_step * together)
        plan.facts.append(
            f"one update = {cfg.dpo.pairs_per_step} pairs, {rank_pairs} a rank; "
            "neither VAE nor text encoder is in memory"
        )
        check_training(cfg.generator, wan.family, zero_stage=cfg.zero_stage)
        cost = wan.flow_error(samples, reference=False)
        if cfg.dpo.method == "dpo":
            cost += wan.flow_error(samples, reference=True)
        cost = _shared(cost, together)
        plan.phase("update", cost * (rank_pairs / cfg.dpo.micro_batch))
    return plan


def plan_pairs(cfg: PairsRun, where: Where) -> Plan:
    """Plan the candidates of a prompt: sampling, decoding, rewards."""
    count = cfg.pairs.candidates
    with _meter(where, cfg.generator) as meter:
        # A pair is two latents.
        wan = MetaWan(cfg.generator, meter)
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
        plan.phase("sampling", _with_frozen(plan, wan, wan.sample(count)))
        _add_decoding(plan, wan, count, text_encoder=True)
        _add_rewards(plan, meter, cfg.rewards, count, count, cfg.generator)
        plan.hold("frames of the candidates", count * _frames(cfg.generator))
    return plan


def plan_reward_model(
    cfg: ColdStartRun | DualRlRun,
    where: Where,
    lengths: Lengths | None = None,
) -> Plan:
    """Plan a stage of DeScore on pairs of videos of ``lengths``.

    None stands for five seconds of 480 x 832.
    """
    cold_start = isinstance(cfg, ColdStartRun)
    key = "checkpoint" if cfg.checkpoint is not None else "base"
    name = getattr(cfg, key)
    with _meter(where) as meter:
        # The model that is trained.
        model = MetaRewardModel(
            name,
            dtype=cfg.dtype,
            settings=cfg.video if cold_start else None,
            meter=meter,
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
        disk = _checkpoint_bytes(sizes) * cfg.keep + sizes.bytes
        unit, count = ("update", 0) if cold_start else ("step", cfg.dual_rl.steps)
        plan = Plan(where, unit, count, disk)
        plan.parts += training_parts(
            "reward model",
            sizes,
            zero_stage=cfg.zero_stage,
            ranks=where.ranks,
            bucket=_bucket(cfg.deepspeed),
        )
        plan.facts += [
            f"{model.name}: {sizes.trained:,} of {sizes.parameters:,} parameters are trained",
            f"a video is {lengths.video} tokens, its prompt about {lengths.prompt}, "
            f"a chain of thought about {lengths.chain}",
        ]
        _note_assumed(plan, key, name, model)
        plan.hold("weights while they are read", sizes.bytes)
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
    whole = model.read(2 * how.micro_batch, lengths, grad=True)
    bare = model.read(2 * how.micro_batch, replace(lengths, chain=1), grad=True)
    # Masking drops a share of the text, and memory must hold all of it.
    dropped = how.masking.probability
    cost = whole * (1 - dropped) + bare * dropped
    plan.phase("update", cost * (rank_pairs / how.micro_batch))
    plan.facts.append(f"one update = {how.pairs_per_step} pairs, {rank_pairs} a rank")


def _add_dual_rl(
    plan: Plan,
    cfg: DualRlRun,
    model: MetaRewardModel,
    lengths: Lengths,
) -> None:
    """Add the writing of chains of thought and the packed update of stage 2."""
    from rm.config import Generation

    how = cfg.dual_rl
    plan.divide("pairs_per_step", how.pairs_per_step)
    rank_pairs = how.pairs_per_step // plan.where.ranks
    micro_batches = rank_pairs / how.micro_batch

    # Memory besides the training state.
    if cfg.lora is None and how.kl_weight:
        shards = plan.where.ranks if cfg.zero_stage == 3 else 1
        plan.add("frozen copy for KL", sizes_of(model.model).bytes / shards)

    # Writing: the prefix once a video, then every token of all chains of thought together.
    sampling = Generation(
        max_new_tokens=how.max_new_tokens,
        temperature=how.temperature,
        repetition_penalty=1.0,
    )
    videos = 2 * how.micro_batch
    _add_writing(plan, cfg, model, lengths, sampling, 2 * rank_pairs)

    # Log-probabilities: the reference's, and with several updates a step the old policy's.
    cots_per_row = how.cots_per_row or how.group_size
    rows = videos * how.group_size // cots_per_row

    def packed(*, grad: bool) -> Cost:
        return model.packed(
            rows,
            lengths,
            cots=cots_per_row,
            temperature=how.temperature,
            grad=grad,
        )

    passes = int(how.pairs_per_step > how.pairs_per_update) + int(how.kl_weight > 0)
    if passes:
        plan.phase("log-probabilities", packed(grad=False) * (passes * micro_batches))
    plan.phase("update", packed(grad=True) * micro_batches)

    plan.facts.append(
        f"one step = {how.pairs_per_step} pairs x 2 videos x {how.group_size} chains of thought, "
        f"{rank_pairs} pairs a rank, {how.pairs_per_step // how.pairs_per_update} optimizer "
        f"steps; rows of {lengths.prefix + cots_per_row * lengths.chain:,} places"
    )


def _add_writing(
    plan: Plan,
    cfg: DualRlRun,
    model: MetaRewardModel,
    lengths: Lengths,
    sampling: Generation,
    videos: int,
) -> None:
    """Add the writing of the chains of thought about a rank's videos, by either engine."""
    how = cfg.dual_rl
    copies = how.group_size
    name = "chains of thought"
    if how.engine == "vllm":
        sleeps = cfg.vllm is None or cfg.vllm.sleep
        add_vllm(
            plan,
            name,
            model,
            lengths,
            sampling,
            videos=videos,
            copies=copies,
            sleeps=sleeps,
        )
        return
    together = min(how.cot_batch or 2 * how.micro_batch, videos)
    written = model.write(together, lengths, how=sampling, copies=copies)
    plan.phase(name, written * (videos / together))


def _add_rewards(
    plan: Plan,
    meter: Meter,
    rewards: dict[str, RewardConfig],
    videos: int,
    at_once: int,
    how: GeneratorConfig,
) -> None:
    """Add the rewards that are a DeScore in this process; the cost of others is not known.

    videos   of a rank in a unit
    at_once  of them in one call of the rewards
    """
    for name, reward in rewards.items():
        # Other rewards may run anywhere.
        if not is_descore(name, reward):
            plan.facts.append(f"reward {name}: not counted")
            continue
        model = MetaRewardModel(reward.checkpoint or "", dtype="bfloat16", meter=meter)
        _note_assumed(plan, f"rewards.{name}.checkpoint", reward.checkpoint, model)

        # The default batch is that of rm.scorer.DeScoreScorer.
        batch = min(int(reward.options.get("batch", 32)), at_once)
        cots = int(reward.options.get("cots", 1))
        lengths = lengths_of(
            model.settings,
            frames=how.num_frames,
            fps=how.fps,
            height=how.height,
            width=how.width,
        )
        plan.add(f"reward {name}: weights", sizes_of(model.model).bytes)
        if reward.options.get("engine") == "vllm" and cots:
            vllm = reward.options.get("vllm") or {}
            add_vllm(
                plan,
                f"reward {name}",
                model,
                lengths,
                model.scoring(cots),
                videos=videos,
                copies=cots,
                sleeps=vllm.get("sleep", True),
            )
            continue
        cost = model.score(batch, lengths, cots=cots) * (videos / batch)
        plan.phase(f"reward {name}", cost)


def _shared(cost: Cost, ranks: int) -> Cost:
    """Cost of a rank where so many share the tokens of every sample, and so its activations.

    What they exchange at every attention is not counted.
    """
    return replace(cost * (1 / ranks), peak=cost.peak / ranks)


def _with_frozen(plan: Plan, wan: MetaWan, cost: Cost) -> Cost:
    """Add the weights of a transformer that is not trained, for good or to the peak of ``cost``.

    One that waits on the host costs its copy to the device as well; its seconds are not counted.
    """
    if wan.frozen is None:
        return cost
    size = sizes_of(wan.frozen).bytes
    if not wan.cfg.experts.offload:
        plan.add("frozen transformer: weights", size)
        return cost
    plan.hold("frozen transformer: weights", size)
    return replace(cost, peak=cost.peak + size)


def _add_decoding(
    plan: Plan,
    wan: MetaWan,
    videos: int,
    *,
    text_encoder: bool,
) -> None:
    """Add the VAE, and with ``text_encoder`` that of the prompts."""
    plan.add("VAE: weights", sizes_of(wan.vae).bytes)
    if wan.small_decoder is not None:
        plan.add("scoring decoder: weights", sizes_of(wan.small_decoder).bytes)
        if not Path(wan.cfg.scoring_decoder).is_dir():
            plan.assumed.append(
                f"generator.scoring_decoder: {wan.cfg.scoring_decoder} is no folder, planned with "
                "the sizes of TAESD"
            )
    if text_encoder:
        plan.add("text encoder: weights", sizes_of(wan.text_encoder).bytes)
        if wan.family.image == "channels+clip":
            size = CLIP_PARAMETERS * wan.dtype.itemsize
            plan.add("image encoder: weights", size)
    plan.phase("decoding", wan.decode(1) * videos)


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


def _meter(where: Where, cfg: GeneratorConfig | None = None) -> Meter:
    return Meter(where.rates, tf32=cfg is not None and cfg.tf32)


def _bucket(overrides: Mapping[str, Any]) -> float:
    """Elements of DeepSpeed's reduce bucket, from the run's ``deepspeed`` section."""
    zero = overrides.get("zero_optimization") or {}
    return float(zero.get("reduce_bucket_size", REDUCE_BUCKET))


def _frames(cfg: GeneratorConfig) -> float:
    """Bytes of a decoded video."""
    return 3.0 * cfg.num_frames * cfg.height * cfg.width


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
        bucket=_bucket(cfg.deepspeed),
    )
    plan.hold("weights while they are read", sizes.bytes)
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
