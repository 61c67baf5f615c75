"""Train a small decoder for rewards on the tiny Wan's latents, and measure what it does to orders.

    python toy/build_decoder.py --out docs/results/scoring_decoder.json

The decoder (`generator.scoring_decoder`) learns the VAE's pixels, mean |small - VAE|, on videos
that the tiny flow map samples of training prompts. Then the oracle scores groups of held-out
prompts by both decoders: GRPO sees nothing of a reward but the order and the distances within a
group. Each seed has an initialisation, an order of the data and groups of its own. The decoders
are folders for ``generator.scoring_decoder`` in ``--work``. An interrupted run continues from its
last saved state.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from alignment.prompts import read_prompts
from alignment.self_checks import rank_correlation
from common.config import load
from common.distributed import derive_seed
from generator.scoring_decoder import ScoringDecoder
from launch.compose import build_generator
from launch.planning.known_models import small_decoder
from launch.schemas.training import GrpoRun
from toy.build_wan import heldout_prompts
from toy.oracle import ShapesOracle
from toy.pixels import to_unit
from toy.training import Fit, cached, fit

if TYPE_CHECKING:
    from generator.wan import WanGenerator

NAME = "decoder"
CONFIG = Path("configs/shapes/grpo_anyflow.yaml")
SEEDS = (0, 1, 2)
# The decoder: its width, and latent frames beside each other.
WIDTH = 16
WINDOW = 2
# Its training.
CLIPS = 1024
STEPS = 300
BATCH = 16
PEAK = 4e-3
# The groups that are scored.
GROUPS = 32
MEMBERS = 8


# ---- the decoder ----


def new_decoder(generator: WanGenerator, seed: int) -> ScoringDecoder:
    """Make an untrained decoder that fits the generator's VAE."""
    config = small_decoder(generator.codec.vae.config)
    stages = len(config["decoder_block_out_channels"])
    config["decoder_block_out_channels"] = [WIDTH] * stages
    config["latent_channels"] *= WINDOW
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoencoderTiny.from_config(config)
    return ScoringDecoder(model, generator.codec, source=NAME, batch=MEMBERS)


def train(decoder: ScoringDecoder, clean: Tensor, video: Tensor, how: Fit) -> None:
    """Fit the decoder's pixels to those of the VAE: MEAN of |difference| over all of them."""
    name = how.name

    def loss_at(step: int) -> Tensor:
        rng = random.Random(f"{name}-{step}")
        rows = [rng.randrange(len(clean)) for _ in range(BATCH)]
        error = decoder.pixels(clean[rows]) - to_unit(video[rows])
        return error.abs().mean()

    # Its encoder is not used.
    module = decoder.model.decoder.requires_grad_(requires_grad=True)
    fit(how, module, loss_at, dict)
    module.requires_grad_(requires_grad=False)


def training_videos(generator: WanGenerator, work: Path) -> tuple[Tensor, Tensor]:
    """Sample latents of training prompts, and decode them by the VAE; cached in files."""
    prompts = read_prompts("assets/shapes/prompts_train.txt")
    chosen = random.Random(NAME).choices(prompts, k=CLIPS)
    seeds = [derive_seed(0, NAME, i) for i in range(CLIPS)]
    clean = cached(
        work / f"{NAME}_latents.safetensors",
        "latent",
        lambda: generator.sample(chosen, seeds),
    )
    video = cached(
        work / f"{NAME}_videos.safetensors",
        "video",
        lambda: generator.decode(clean).contiguous(),
    )
    return clean, video


# ---- what it does to a reward ----


def order_changes(small_GM: Tensor, whole_GM: Tensor) -> dict[str, float]:
    """Compare rewards of the same members by two decoders, (G, M) each, within groups.

    rank_correlation  Spearman's, MEAN over the groups where neither side is constant
    defined           how many groups these are
    cosine            of the rewards about the groups' means, which is that of the advantages
                      before they are scaled
    exchanged, lost, made  shares of all pairs of members whose order turned, became a tie, or
                      was a tie
    tied              share of the pairs that are a tie by the VAE
    """
    # Spearman's correlation of each group.
    found = []
    for small_M, whole_M in zip(small_GM, whole_GM, strict=True):
        correlation = rank_correlation(small_M, whole_M)
        if correlation is not None:
            found.append(correlation)

    # Advantages point where rewards about the group's mean do.
    small = (small_GM - small_GM.mean(dim=1, keepdim=True)).flatten()
    whole = (whole_GM - whole_GM.mean(dim=1, keepdim=True)).flatten()
    cosine = torch.cosine_similarity(small, whole, dim=0)

    # Each pair once.
    first, second = torch.triu_indices(small_GM.shape[1], small_GM.shape[1], offset=1)
    small_GP = (small_GM[:, first] - small_GM[:, second]).sign()
    whole_GP = (whole_GM[:, first] - whole_GM[:, second]).sign()
    kinds = {
        "exchanged": small_GP * whole_GP < 0,
        "lost": (small_GP == 0) & (whole_GP != 0),
        "made": (small_GP != 0) & (whole_GP == 0),
        "tied": whole_GP == 0,
    }
    shares = {name: float(kind.float().mean()) for name, kind in kinds.items()}
    correlation = fmean(found) if found else float("nan")
    return {
        "rank_correlation": correlation,
        "defined": len(found),
        "cosine": float(cosine),
        **shares,
    }


def compare(
    small: Tensor, whole: Tensor, rewards: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Differences of pixels (levels of 255) and of rewards, videos and rewards in two versions."""
    small_GM, whole_GM = rewards
    levels = (small.float() - whole.float()).abs().mean()
    return {
        "levels": float(levels),
        "reward": float(small_GM.mean()),
        "reward_vae": float(whole_GM.mean()),
        **order_changes(small_GM, whole_GM),
    }


def measure_groups(
    generator: WanGenerator,
    plain: WanGenerator,
    decoder: ScoringDecoder,
    *,
    seed: int,
    groups: int,
) -> dict[str, dict[str, float]]:
    """Score groups of held-out prompts by the small decoder and by the VAE in bf16.

    Both are compared with the VAE in fp32. The groups are GRPO's, with a stochastic step.
    """
    # 1. The groups.
    prompts = heldout_prompts(groups, 10 + seed)
    seeds = [derive_seed(seed, "groups", i) for i in range(groups)]
    rolled = generator.rollout(prompts, group_size=MEMBERS, seeds=seeds)
    clean = torch.cat([group.clean_GCFHW for group in rolled])
    texts = [prompt for prompt in prompts for _ in range(MEMBERS)]

    # 2. Their videos by three decoders, and the oracle's rewards.
    videos = {
        "vae": generator.decode(clean),
        "small": decoder.decode(clean),
        "vae_bfloat16": plain.decode(clean),
    }
    rewards = {}
    for name, video in videos.items():
        score = ShapesOracle().score(video, texts, fps=generator.cfg.fps)
        rewards[name] = score.value_B.double().view(groups, MEMBERS)

    # 3. Against the VAE.
    measured = {}
    for name in ("small", "vae_bfloat16"):
        both = (rewards[name], rewards["vae"])
        measured[name] = compare(videos[name], videos["vae"], both)
    return measured


def build(
    work: Path, *, steps: int = STEPS, groups: int = GROUPS, seeds: tuple[int, ...]
) -> dict[str, Any]:
    """Train a decoder of each seed and measure it; folders are ``work/decoder-SEED``."""
    cfg = load(GrpoRun, CONFIG).generator
    generator = build_generator(cfg)
    rounded = build_generator(replace(cfg, vae_dtype="bfloat16"))
    clean, video = training_videos(generator, work)

    measured = []
    for seed in seeds:
        name = f"{NAME}-{seed}"
        decoder = new_decoder(generator, seed)
        train(decoder, clean, video, Fit(name, steps, PEAK, work, every=100))
        decoder.model.save_pretrained(work / name)
        found = measure_groups(generator, rounded, decoder, seed=seed, groups=groups)
        measured.append({"seed": seed, **found})
        print(json.dumps(measured[-1]), flush=True)
    count = sum(p.numel() for p in decoder.model.decoder.parameters())
    return {
        "command": "python toy/build_decoder.py --out docs/results/scoring_decoder.json",
        "parameters": count,
        "parameters_vae": sum(
            p.numel() for p in generator.codec.vae.decoder.parameters()
        ),
        "steps": steps,
        "batch": BATCH,
        "learning_rate": PEAK,
        "clips": CLIPS,
        "groups": groups,
        "members": MEMBERS,
        "seeds": measured,
    }


def main() -> None:
    """Train, measure and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file of the numbers")
    parser.add_argument("--work", type=Path, default=Path("runs/build_shapes"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--groups", type=int, default=GROUPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)

    result = build(
        args.work, steps=args.steps, groups=args.groups, seeds=tuple(args.seeds)
    )
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
