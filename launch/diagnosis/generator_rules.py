"""Rules over a generator's measurements: what two routes to its numbers say.

Adapter, sampler, update's transitions, log-probs, text, videos and the evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from launch.diagnosis.evidence import Certainty, Diagnosis, Evidence
from launch.diagnosis.reward_rules import PIXEL_MISTAKES, wrong_fps
from launch.diagnosis.setting_rules import all_skipped
from launch.diagnosis.update_rules import other_loss

# Relative differences of velocities, by the generator's dtype: rounding is far below.
VELOCITY_LIMIT = {"float32": 1e-4, "bfloat16": 2e-2}
# Log-probs are fp32 whatever the generator's dtype is.
LOG_PROB_LIMIT = 5e-6
# |ratio - 1| of the loop's own steps, with one update a rollout.
RATIO_LIMIT = {"float32": 1e-4, "bfloat16": 5e-3}
# MEAN difference of two videos in levels of 255.
PIXEL_LIMIT = {"float32": 0.1, "bfloat16": 1.5}
# A variant explains a gap if it leaves this part of it.
EXPLAINS = 0.2
# A gap below this part of the largest need not have the same explanation.
SMALLER = 0.1
# Relative difference of the latents of two members.
LEAST_APART = 0.02
# Latents from independent noise differ by about sqrt(2) of their size.
UNRELATED = 1.0
# Independent noises have hardly anything in common, and one size.
UNLIKE = 0.2


def generator_rules(evidence: Evidence) -> Iterator[Diagnosis]:
    """Apply every rule over measurements of the generator."""
    yield from _adapter(evidence)
    yield from _rollout(evidence)
    yield from _update(evidence)
    yield from _log_prob(evidence)
    yield from _text(evidence)
    yield from _videos(evidence)
    yield from _evaluation(evidence)


def _adapter(evidence: Evidence) -> Iterator[Diagnosis]:
    if evidence.setting("generator.lora") is None:
        return
    norm_b = evidence.measured("adapter/lora_B_norm")
    moved = evidence.measured("weights/moved")
    gradient = evidence.measured("gradient/norm")
    # Without an advantage nothing should move.
    if not norm_b or not moved or all_skipped(evidence):
        return
    if max(moved) == 0 and max(gradient, default=0.0) > 0:
        yield Diagnosis(
            "adapter-frozen",
            "certain",
            "the adapter is frozen: gradients reach it, and no weight moves",
            f"gradient norm {max(gradient):.2g}, change of the weights 0 over {len(moved)} updates",
            "check that the optimizer holds the adapter's parameters, and its learning rate",
        )
        return
    if norm_b[-1] == 0:
        count = evidence.measured("adapter/lora_B_trained")
        yield Diagnosis(
            "lora-b-zero",
            "certain",
            "every lora_B is zero, so the adapter changes nothing",
            f"norm of all lora_B after {len(norm_b)} updates is 0, {count[-1]:.0f} of them are "
            f"trained, the gradient's norm is {max(gradient, default=0.0):.2g}",
            "train lora_B, do not reset it between updates, and start lora_A from random numbers",
        )
        return
    frozen = max(evidence.measured("adapter/frozen"), default=0.0)
    if frozen > 0:
        yield Diagnosis(
            "adapter-frozen",
            "certain",
            "a part of the adapter is frozen",
            f"{frozen:.0f} of its matrices do not require a gradient",
            "train all matrices of the adapter",
        )
    # The adapter has weights; does it have an effect?
    drift = evidence.measured("adapter/drift")
    if drift and drift[-1] == 0:
        yield Diagnosis(
            "adapter-without-effect",
            "certain",
            "the adapter has weights and never reaches the sampler or the update: it is switched "
            "off in the transformer",
            f"norm of lora_B {norm_b[-1]:.2g}, change of the velocity 0",
            "check that the adapter is active (peft's disable_adapter), and its scaling",
        )
        return
    # And does the reference differ from the policy?
    effect = evidence.measured("update/adapter_effect")
    if drift and effect and drift[-1] > 0 and effect[-1] == 0:
        yield Diagnosis(
            "reference-is-policy",
            "certain",
            "the reference policy is the policy itself: KL is always 0",
            "switching to the reference changes nothing, switching the adapter off does",
            "check WanGenerator.reference: it must switch the adapter off",
        )


def _rollout(evidence: Evidence) -> Iterator[Diagnosis]:
    """What the sampler computed at stochastic steps and in the tail."""
    limit = _velocity_limit(evidence)
    if evidence.setting("generator.sampler.merge_adapter"):
        # Merging rounds otherwise than the adapter's own products.
        limit *= 10
    for name in ("rollout", "prefix", "tail"):
        gap, variant = worst_gap(evidence, name)
        if gap <= limit:
            continue
        because = f"{name}: relative difference from the policy {gap:.2g}"
        if name == "prefix" and gap > UNRELATED and not variant:
            # The velocity was right: the walk must have begun elsewhere.
            yield _wrong_noise("likely", because)
            return
        known = strength(evidence, name, gap)
        if name == "rollout" and known is None:
            known = noise_of_another_size(evidence, gap, because)
        if not variant and known is not None:
            yield known
            return
        yield _of_sampler(variant, because)
        return

    start = max(evidence.measured("rollout/start_gap"), default=0.0)
    if start > limit:
        because = f"relative difference from the seed's noise {start:.2g}"
        yield _wrong_noise("certain", because)

    # Fast samplers have no exact counterpart, but the adapter must change what they sample.
    effect = evidence.measured("rollout/adapter_effect")
    in_update = evidence.measured("update/adapter_effect")
    if effect and in_update and effect[-1] == 0 and in_update[-1] > 0:
        yield _of_sampler("reference", "switching the adapter off changes no sample")


def noise_of_another_size(
    evidence: Evidence, gap: float, because: str
) -> Diagnosis | None:
    """The rollout's mean is right, and its noise is not what the density says."""
    for row in evidence.measurements:
        if row.get("rollout/gap/policy") != gap:
            continue
        size = row.get("rollout/strength/noise", 1.0)
        if row.get("rollout/beside/noise", math.inf) < EXPLAINS * gap:
            return _noise_size(
                f"{because}; the noise is {size:.2g} times its density's"
            )
        # Noise of the right size that has nothing to do with the seed's.
        if abs(size) < UNLIKE and math.isclose(row["rollout/noise"], 1, abs_tol=UNLIKE):
            return _wrong_noise("likely", f"{because}; its noise is another's")
    return None


def _noise_size(because: str) -> Diagnosis:
    return Diagnosis(
        "noise-size",
        "certain",
        "members of a group do not differ by the noise that their density has",
        because,
        "each member needs noise of its own, of the size that the log-prob assumes",
    )


def _wrong_noise(certainty: Certainty, because: str) -> Diagnosis:
    return Diagnosis(
        "wrong-noise",
        certainty,
        "rollouts do not start from the noise of their seeds: prompts or steps may share one",
        because,
        "draw the first noise from the group's seed",
    )


def _of_sampler(variant: str, because: str) -> Diagnosis:
    if variant == "reference":
        return Diagnosis(
            "adapter-not-in-sampler",
            "certain",
            "the adapter never reaches the sampler: videos are sampled by the base model, while "
            "the update trains the policy",
            f"{because}; without the adapter the difference vanishes",
            "sample with the weights that are trained; check merging and syncing of weights",
        )
    if variant in ("other-prompt", "no-prompt"):
        return Diagnosis(
            "wrong-embeddings",
            "certain",
            "the sampler uses text embeddings of other prompts",
            f"{because}; with another prompt's embedding the difference vanishes",
            "check the order of prompts and embeddings, and any cache of them",
        )
    if variant == "unguided":
        return Diagnosis(
            "guidance-not-in-rollout",
            "certain",
            "the rollout is not guided as the settings say",
            f"{because}; without guidance the difference vanishes",
            "use one guidance scale in rollout and update",
        )
    if variant == "before":
        return Diagnosis(
            "sampler-lags",
            "certain",
            "the sampler's weights lag behind: it samples with those before the last update",
            f"{because}; with the weights before the update the difference vanishes",
            "hand the weights to the sampler after every update",
        )
    if variant == "half":
        return Diagnosis(
            "rollout-dtype",
            "likely",
            "the rollout computes in half precision and the update does not",
            f"{because}; in half precision the difference is small",
            "use one dtype in rollout and update",
        )
    return Diagnosis(
        "rollout-differs",
        "likely",
        "the sampler does not compute what the transformer predicts",
        f"{because}; no known mistake explains it",
        "compare rollout and update: timestep, guidance, embeddings, weights, dtype",
    )


def _update(evidence: Evidence) -> Iterator[Diagnosis]:
    """What the update computes at a stochastic step."""
    gap, variant = worst_gap(evidence, "update")
    limit = _velocity_limit(evidence)
    if gap > limit:
        # Known mistakes by the variant that explains the gap.
        because = f"update: relative difference from the policy {gap:.2g}"
        causes = {
            "unguided": (
                "guidance-not-in-update",
                "the rollout is guided and the update is not",
            ),
            "half": (
                "log-prob-dtype",
                "the update computes log-probs in another dtype than the rollout",
            ),
            "other-prompt": (
                "wrong-embeddings",
                "the update uses text embeddings of other prompts",
            ),
            "no-prompt": (
                "wrong-embeddings",
                "the update uses the embedding of another prompt: the negative one",
            ),
            "reference": (
                "adapter-not-in-update",
                "the update computes the base model: the adapter is off in it",
            ),
            "before": (
                "update-differs",
                "the update computes log-probs with the weights before the last update",
            ),
        }
        other = (
            "update-differs",
            "the update does not compute what the rollout sampled from",
        )
        cause, what = causes.get(variant, other)
        known = strength(evidence, "update", gap)
        if not variant and known is not None:
            yield known
        else:
            yield Diagnosis(
                cause,
                "certain" if variant in causes else "likely",
                what,
                because,
                "rollout and update must compute the same transition, or the ratio means nothing",
            )
    # The same input twice.
    repeat = evidence.measured("update/repeat")
    if repeat and max(repeat) > limit:
        yield Diagnosis(
            "random-forward",
            "certain",
            "two forwards of the same input differ: dropout is on, or the module is in training "
            "mode",
            f"relative difference {max(repeat):.2g}",
            "set dropout to 0 and the module to eval()",
        )


def _log_prob(evidence: Evidence) -> Iterator[Diagnosis]:
    rollout = evidence.measured("rollout/log_prob_gap")
    update = evidence.measured("update/log_prob_gap")
    worst = max(rollout + update, default=0.0)
    ratio = max(evidence.column("train/ratio_max_dev"), default=0.0)
    limit = RATIO_LIMIT[evidence.setting("generator.dtype", "bfloat16")]
    one_update = evidence.setting("grpo.updates", 1) == 1
    if worst > LOG_PROB_LIMIT:
        yield Diagnosis(
            "log-prob-dtype",
            "likely",
            "log-probs are computed in another dtype than fp32, or by another formula",
            f"they differ by {worst:.2g} from fp64 on the same latents",
            "compute log-probs in fp32: their differences are far smaller than their values",
        )
    elif one_update and ratio > limit and not other_loss(evidence):
        gap = max(worst_gap(evidence, "rollout")[0], worst_gap(evidence, "update")[0])
        if gap > _velocity_limit(evidence):
            # The velocities explain the ratio.
            return
        yield Diagnosis(
            "log-prob-dtype",
            "likely",
            "the ratio is not 1 before an update, though rollout and update compute the same "
            "velocity: the loss computes its log-prob in another dtype or by another formula",
            f"largest |ratio - 1| is {ratio:.2g}",
            "compute log-probs in fp32, by one function, in rollout and update",
        )


def _text(evidence: Evidence) -> Iterator[Diagnosis]:
    # Embeddings in the generator's cache, then their effect.
    gap = max(evidence.measured("text/gap"), default=0.0)
    if gap > _velocity_limit(evidence):
        yield Diagnosis(
            "wrong-embeddings",
            "certain",
            "the generator has text embeddings of other prompts, or wrong ones",
            f"relative difference from the text encoder's {gap:.2g}",
            "check the order of prompts and embeddings, and any cache of them",
        )
    effect = evidence.measured("text/effect")
    if effect and max(effect) < 1e-6:
        yield Diagnosis(
            "prompt-without-effect",
            "certain",
            "the prompt has no effect on the generator: all prompts have one embedding",
            f"change of the velocity by another prompt {max(effect):.2g}",
            "check the text encoder, its padding and the cross-attention",
        )

    cut = max(evidence.measured("text/cut"), default=0.0)
    if cut > 0.2:
        yield Diagnosis(
            "prompts-cut",
            "likely" if cut > 0.5 else "possible",
            "prompts are cut off for the generator, while rewards read all of them",
            f"{100 * cut:.0f} % have more than "
            f"{evidence.setting('generator.max_sequence_length', 512)} tokens",
            "raise generator.max_sequence_length to what the model was trained with, or shorten "
            "the prompts",
        )


def _videos(evidence: Evidence) -> Iterator[Diagnosis]:
    # Noise levels.
    sigma = max(evidence.measured("rollout/sigma_gap"), default=0.0)
    if sigma > 1e-6:
        yield Diagnosis(
            "wrong-shift",
            "certain",
            "the sampler's noise levels are not those of the settings: the shift has another size",
            f"a stochastic step lies {sigma:.2g} away from the grid of "
            f"shift={evidence.setting('generator.sampler.shift', 3.0):g}",
            "use one grid of noise levels",
        )
    # Latents and pixels.
    gap, variant = worst_gap(evidence, "decode")
    # Of the base model: training may lead latents anywhere.
    round_trip = (evidence.measured("vae/round_trip") or [0.0])[0]
    limit = pixel_limit(evidence, "generator.vae_dtype", "float32")
    if gap > limit:
        yield _of_pixels(gap, variant)
    elif round_trip > evidence.certificate.get("round_trip_limit", 0.8):
        yield Diagnosis(
            "vae-scaling",
            # Videos of another size than the VAE was trained on come back worse, too.
            "likely" if round_trip > 1.2 else "possible",
            "the VAE does not find its latents again: its config may state a wrong scaling",
            f"relative difference after decoding and encoding {round_trip:.2f}",
            "compare latents_mean and latents_std of vae/config.json with the released ones",
        )
    scored = max(evidence.measured("scored/gap"), default=0.0)
    if scored > limit and gap <= limit:
        yield Diagnosis(
            "reward-other-videos",
            "certain",
            "the videos that rewards score are not those of the samples that are trained",
            f"they differ by {scored:.1f} of 255 from the samples, decoded",
            "keep samples and videos in one order between decoding and scoring",
        )
    # Members that share their start are apart by the noise alone.
    apart = evidence.measured("rollout/members_apart")
    if (
        apart
        and not 0.5 < apart[-1] < 2
        and evidence.setting("generator.sampler.initial_noise", "shared") == "shared"
    ):
        because = f"they are {apart[-1]:.2f} times as far apart as the step's std says"
        cause = "members-alike" if apart[-1] <= 0.5 else "noise-size"
        yield replace(_noise_size(because), cause=cause)
    # The noise may be as large as its density says, and still too small to explore.
    differ = sorted(evidence.measured("samples/apart"))
    if differ and differ[len(differ) // 2] < LEAST_APART:
        yield Diagnosis(
            "members-alike",
            "likely",
            "members of a group are nearly the same video, so there is nothing to compare",
            f"their latents differ by {100 * differ[len(differ) // 2]:.2g} %",
            "raise generator.sampler.noise_level, or let earlier steps be stochastic",
        )


def _of_pixels(gap: float, variant: str) -> Diagnosis:
    because = f"pixels differ by {gap:.1f} of 255 from those by the VAE's config"
    mistakes = {
        "channels": "channels-swapped",
        "reversed": "frames-reversed",
        "upside-down": "frames-turned",
        "mirrored": "frames-turned",
        "transposed": "frames-turned",
    }
    if variant in mistakes:
        return Diagnosis(
            mistakes[variant],
            "certain",
            f"decoded videos are changed: {PIXEL_MISTAKES[variant]}",
            f"{because}; changed so, they are equal",
            "decode to RGB frames (time, height, width, channel), in the order of time",
        )
    also = f": {PIXEL_MISTAKES[variant]}" if variant else ""
    return Diagnosis(
        "vae-scaling",
        "certain",
        "latents are scaled wrongly before the VAE, or its output is not turned into bytes "
        f"rightly{also}",
        f"{because}, latents * latents_std + latents_mean",
        "undo the normalisation of the VAE's config before decoding",
    )


# ---- evaluation ----


def _evaluation(evidence: Evidence) -> Iterator[Diagnosis]:
    """What the evaluation of the run sampled, in levels of 255."""
    trained = max(evidence.measured("evaluation/trained"), default=0.0)
    if trained > 0:
        yield Diagnosis(
            "evaluation-trained",
            "likely" if trained > 0.5 else "possible",
            "evaluated prompts are not held out: the run trains on them",
            f"{100 * trained:.0f} % of the evaluated prompts",
            "evaluate on prompts that are in no line of the prompts of training",
        )
    gap, variant = worst_gap(evidence, "evaluation")
    limit = 3 * pixel_limit(evidence, "generator.dtype", "bfloat16")
    # Options of the sampler that are allowed to be less exact.
    sampler = evidence.setting("generator.sampler", {})
    if sampler.get("merge_adapter") or sampler.get("attention"):
        limit = max(limit, 3 * PIXEL_LIMIT["bfloat16"])
    guidance = evidence.measured("evaluation/guidance")
    scale = evidence.setting("generator.sampler.guidance_scale", 4.5)
    other_scale = bool(guidance) and not math.isclose(guidance[-1], scale)
    if gap > limit and variant == "reference":
        yield Diagnosis(
            "evaluation-without-adapter",
            "certain",
            "the evaluation samples without the adapter: it measures the base model",
            f"its video differs by {gap:.1f} of 255 from the policy's and is the base model's",
            "evaluate with the trained weights",
        )
    elif gap > limit and variant in ("other-prompt", "no-prompt"):
        yield Diagnosis(
            "wrong-embeddings",
            "certain",
            "the evaluation samples with text embeddings of other prompts",
            f"its video differs by {gap:.1f} of 255 from the policy's and is another prompt's",
            "check the order of prompts and embeddings within a batch",
        )
    elif gap > limit or other_scale:
        known = f", its guidance is {guidance[-1]:g}" if other_scale else ""
        yield Diagnosis(
            "evaluation-settings",
            "certain" if other_scale or variant == "unguided" else "likely",
            "the evaluation samples with another guidance, other settings or other weights than "
            "training",
            f"its video differs by {gap:.1f} of 255 from the policy's{known}; nearest to "
            f"{variant or 'no known variant'}",
            f"evaluate at guidance_scale={scale:g} and with the sampler of the run",
        )
    # The rewards of an evaluation are told a frame rate too.
    ratio = evidence.measured("evaluation/fps_ratio")
    if ratio and not math.isclose(ratio[-1], 1, rel_tol=0.01):
        yield wrong_fps("the evaluation", ratio[-1])


# ---- helpers ----


def worst_gap(evidence: Evidence, name: str) -> tuple[float, str]:
    """Largest gap to the policy over the updates, and the variant that explains it ("" if none).

    A variant must explain every gap that is not far smaller; of several the nearest counts.
    """
    key = f"{name}/gap/policy"
    rows = [row for row in evidence.measurements if row.get(key, 0.0) > 0]
    worst = max((row[key] for row in rows), default=0.0)
    left: dict[str, float] | None = None
    for row in rows:
        if row[key] < SMALLER * worst:
            continue
        # What each variant leaves of this gap.
        parts = {}
        for other, value in row.items():
            variant = other.rpartition("/")[2]
            if other.startswith(f"{name}/gap/") and value < EXPLAINS * row[key]:
                parts[variant] = value / row[key]
        if left is None:
            left = parts
        left = {
            variant: part + parts[variant]
            for variant, part in left.items()
            if variant in parts
        }
    return worst, min(left, key=left.get) if left else ""


def strength(evidence: Evidence, name: str, gap: float) -> Diagnosis | None:
    """Guidance or adapter of another strength, if that explains a gap; None if it does not."""
    row = {}
    for measured in evidence.measurements:
        if measured.get(f"{name}/gap/policy") == gap:
            row = measured
    for variant in ("unguided", "reference"):
        part = row.get(f"{name}/strength/{variant}", math.nan)
        beside = row.get(f"{name}/beside/{variant}", math.nan)
        if not beside < EXPLAINS * gap or math.isclose(part, 1, abs_tol=0.02):
            continue
        because = f"{name}: relative difference from the policy {gap:.2g}"
        advice = (
            "rollout and update must compute the same transition at the same strength"
        )
        if variant == "reference":
            return Diagnosis(
                "adapter-scaling",
                "certain",
                f"the {name} uses the adapter at {part:.2g} times its strength",
                because,
                f"{advice}: check alpha / rank, and merging",
            )
        scale = evidence.setting("generator.sampler.guidance_scale", 4.5)
        return Diagnosis(
            "guidance-differs",
            "certain",
            f"the {name} is guided at {1 + part * (scale - 1):.2g}, the settings say {scale:g}",
            because,
            advice,
        )
    return None


def pixel_limit(evidence: Evidence, key: str, default: str) -> float:
    """MEAN difference in levels of 255 that rounding may cause, by the dtype at a key."""
    # TensorFloat-32 rounds products like half precision does.
    if evidence.setting("generator.tf32"):
        return PIXEL_LIMIT["bfloat16"]
    return PIXEL_LIMIT[evidence.setting(key, default)]


def _velocity_limit(evidence: Evidence) -> float:
    return VELOCITY_LIMIT[evidence.setting("generator.dtype", "bfloat16")]
