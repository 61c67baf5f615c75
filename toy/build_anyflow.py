"""Distil the tiny Wan into a flow map (AnyFlow), which samples in one to four forwards.

The student starts as the teacher (`generator.flow_map.from_wan`) and learns the identity of mean
velocities along the teacher's guided ODE:

    u(x, t, r) = v - (t - r) du/dt,   du/dt = d_t u + v . d_x u        (r fixed)

v is the teacher's guided velocity, du/dt a central difference of the student without gradient, as
AnyFlow (2605.13724) takes it. No clip's caption teaches the student anything that the teacher does
not know: clips only say where x lies.

`python toy/build.py --stages anyflow` builds it; `python toy/build_anyflow.py --out FILE` measures
the shipped one.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from diffusers import (
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    AutoencoderKLWan,
    FlowMapEulerDiscreteScheduler,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5EncoderModel

from common.files import give_usual_mode
from common.strict_loading import load_pretrained
from generator.flow import guide, interpolate
from generator.flow_map import from_wan, mean_velocity
from generator.schedule import sigma_grid
from toy.build_wan import (
    CLIPS,
    SHIFT,
    decode,
    embed,
    heldout_prompts,
    noisy_caption,
    training_clips,
)
from toy.measure import measure
from toy.training import Fit, fit

NAME = "anyflow"
STEPS = 200
BATCH = 16
PEAK = 5e-4
GUIDANCE = 3.0
# Half of the difference of times, of 1000: it smooths the embedding of time, on purpose.
EPSILON = 5.0
# Captions of the clips are redrawn with this probability for each attribute.
WRONG = 0.1
# Of a batch: times are equal, the jump ends at the video, the end is free.
SHARES = (0.5, 0.25, 0.25)
DECAY = 0.999
JUMPS = (1, 2, 4)
TEACHER_STEPS = (1, 2, 4, 20)
# Parts of the pipeline that are the teacher's; they are linked.
SHARED = ("vae", "text_encoder", "tokenizer")

Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Teacher:
    """The tiny Wan, frozen."""

    tokenizer: AutoTokenizer
    text_encoder: UMT5EncoderModel
    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan

    @staticmethod
    def load(folder: Path) -> Teacher:
        """Read a WanPipeline folder in fp32."""
        teacher = Teacher(
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            text_encoder=load_pretrained(UMT5EncoderModel, folder / "text_encoder"),
            transformer=load_pretrained(WanTransformer3DModel, folder / "transformer"),
            vae=load_pretrained(AutoencoderKLWan, folder / "vae").float(),
        )
        for part in (teacher.text_encoder, teacher.transformer, teacher.vae):
            part.requires_grad_(requires_grad=False).eval()
        return teacher

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts, see `toy.build_wan.embed`."""
        return embed(self.tokenizer, self.text_encoder, prompts)

    @cached_property
    def empty_1LD(self) -> Tensor:
        """Embedding of no text, for guidance."""
        return self.embed([""])

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma_B: Tensor, text_BLD: Tensor) -> Tensor:
        """The guided velocity, two branches in one forward."""
        both = torch.cat([text_BLD, self.empty_1LD.expand_as(text_BLD)])
        twice_B = torch.cat([sigma_B, sigma_B])
        out = self.transformer(
            torch.cat([x, x]), 1000 * twice_B, both, return_dict=False
        )
        return guide(*out[0].chunk(2), GUIDANCE)

    @torch.no_grad()
    def decode(self, clean: Tensor) -> Tensor:
        """Latents -> uint8 video (B, T, Y, X, 3)."""
        return decode(self.vae, clean)


class Average:
    """Exponential moving average of a module's weights, in a file beside the stage's state."""

    def __init__(self, module: nn.Module, file: Path) -> None:
        self.module = copy.deepcopy(module).requires_grad_(requires_grad=False)
        self.file = file
        if file.exists():
            self.module.load_state_dict(load_file(file))

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take the weights before ``step``; the first steps are forgotten faster."""
        decay = min(DECAY, (1 + step) / (10 + step))
        for mean, weight in zip(
            self.module.parameters(), module.parameters(), strict=True
        ):
            mean.lerp_(weight, 1 - decay)

    def save(self) -> None:
        """Write the average; a killed save leaves the earlier one."""
        partial_file = self.file.with_suffix(".partial")
        save_file(self.module.state_dict(), partial_file)
        partial_file.replace(self.file)


# ---- the loss ----


def two_times(batch: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the two noise levels of each sample: (B,) and (B,), the second at most the first.

    Places in the batch decide (`SHARES`): first those of equal levels, then jumps to the video.
    """
    # Uniform, on the shifted schedule that sampling uses.
    u_2B = torch.rand((2, batch), generator=draw)
    sigma_2B = SHIFT * u_2B / (1 + (SHIFT - 1) * u_2B)
    sigma_B = sigma_2B.amax(dim=0)
    target_B = sigma_2B.amin(dim=0)
    # What each place of the batch is for.
    equal = round(SHARES[0] * batch)
    to_video = round(SHARES[1] * batch)
    target_B[:equal] = sigma_B[:equal]
    target_B[equal : equal + to_video] = 0.0
    return sigma_B, target_B


def time_weight(sigma_B: Tensor) -> Tensor:
    """Weight of a sample, sigma sqrt(1 - sigma), with MEAN 1 over the shifted grid."""
    grid = sigma_grid(1000, shift=SHIFT).float()
    mean = (grid * (1 - grid).sqrt()).mean()
    return sigma_B * (1 - sigma_B).sqrt() / mean


@torch.no_grad()
def derivative(
    average_velocity: Velocity,
    x: Tensor,
    v: Tensor,
    sigma_B: Tensor,
    target_B: Tensor,
    text_BLD: Tensor,
) -> Tensor:
    """du/dt along the ODE for t of 1000, by a central difference around t in [5, 995].

    x moves with v from sigma to both ends of the difference.
    """
    # Both ends of the difference lie in [0, 1].
    half = EPSILON / 1000
    middle_B = sigma_B.clamp(half, 1 - half)
    ends = []
    for side in (1, -1):
        at_B = middle_B + side * half
        moved_B = (at_B - sigma_B).view(-1, 1, 1, 1, 1)
        ends.append(average_velocity(x + moved_B * v, at_B, target_B, text_BLD))
    return (ends[0] - ends[1]) / (2 * EPSILON)


def balanced(loss_B: Tensor, equal: int) -> Tensor:
    """MEAN over samples, each jump scaled to the MEAN loss of the samples of equal times.

    Jumps have losses a hundred times larger, which would drown the diagonal.
    """
    jumps = loss_B[equal:]
    scale = loss_B[:equal].mean() / (jumps + 1e-5)
    return torch.cat([loss_B[:equal], jumps * scale.detach()]).mean()


# ---- measuring ----


@torch.no_grad()
def walk(
    velocity: Velocity,
    teacher: Teacher,
    prompts: Sequence[str],
    *,
    steps: int,
    seed: int,
) -> Tensor:
    """From noise to clean latents by x + (target - sigma) u along the grid of ``steps``."""
    # Noise of the seed, the same for every number of steps.
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn((len(prompts), 16, 3, 8, 8), generator=draw)
    text_BLD = teacher.embed(prompts)
    grid = sigma_grid(steps, shift=SHIFT).float()
    for sigma, target in itertools.pairwise(grid):
        sigma_B = sigma.expand(len(x))
        target_B = target.expand(len(x))
        x = x + (target - sigma) * velocity(x, sigma_B, target_B, text_BLD)
    return x


def evaluate(
    student: nn.Module, teacher: Teacher, *, count: int, seed: int, whole: bool = True
) -> dict[str, float]:
    """Oracle scores of the student, MEAN over held-out prompts, by the number of its jumps.

    distance_N is how far its latents end from those of the teacher's 20 guided steps from the same
    noise, relative to their norm. ``whole`` False leaves out the long walks.
    """
    prompts = heldout_prompts(count, seed)
    measured: dict[str, float] = {}
    ends: dict[str, Tensor] = {}

    # 1. Ends of all walks. The teacher knows no second time.
    def guided(x: Tensor, sigma_B: Tensor, _: Tensor, text_BLD: Tensor) -> Tensor:
        return teacher.velocity(x, sigma_B, text_BLD)

    def diagonal(x: Tensor, sigma_B: Tensor, _: Tensor, text_BLD: Tensor) -> Tensor:
        return mean_velocity(student, x, sigma_B, sigma_B, text_BLD)

    jump = partial(mean_velocity, student)
    for jumps in JUMPS:
        ends[f"jumps_{jumps}"] = walk(jump, teacher, prompts, steps=jumps, seed=seed)
    if whole:
        ends["euler_10"] = walk(diagonal, teacher, prompts, steps=10, seed=seed)
    for steps in TEACHER_STEPS if whole else ():
        name = f"teacher_{steps}"
        ends[name] = walk(guided, teacher, prompts, steps=steps, seed=seed)

    # 2. Scores of the videos.
    for name, clean in ends.items():
        videos = teacher.decode(clean)
        total = 0.0
        for video, prompt in zip(videos, prompts, strict=True):
            total += measure(video, prompt).total
        measured[f"oracle_{name}"] = total / count
    for jumps in JUMPS if whole else ():
        gap = ends[f"jumps_{jumps}"] - ends["teacher_20"]
        measured[f"distance_{jumps}"] = float(gap.norm() / ends["teacher_20"].norm())
    return {**measured, "n": count}


def build(out: Path, work: Path, *, steps: int | None) -> dict[str, float]:
    """Distil, save an AnyFlowPipeline folder to ``out/anyflow`` and measure on held-out prompts."""
    # 1. Teacher, data, and the student that starts as the teacher.
    teacher = Teacher.load(out / "wan")
    latents, attributes = training_clips(teacher.vae, work / "wan_clips.safetensors")
    student = from_wan(teacher.transformer)
    average = Average(student, work / f"{NAME}_average.safetensors")
    equal = round(SHARES[0] * BATCH)

    def loss_at(step: int) -> Tensor:
        """MEAN of weighted squared errors of u, over samples and latent elements."""
        average.update(student, step)
        rng = random.Random(f"{NAME}-{step}")
        draw = torch.Generator().manual_seed(step)

        # 1. Clips with captions, noised.
        rows = [rng.randrange(CLIPS) for _ in range(BATCH)]
        texts = [noisy_caption(attributes[row], rng, wrong=WRONG) for row in rows]
        text_BLD = teacher.embed(texts)
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=draw)
        sigma_B, target_B = two_times(BATCH, draw)
        x = interpolate(clean, noise, sigma_B)

        # 2. The target: the teacher's velocity, and for jumps how u changes on the way.
        v = teacher.velocity(x, sigma_B, text_BLD)
        target = v.clone()
        change = derivative(
            partial(mean_velocity, student),
            x[equal:],
            v[equal:],
            sigma_B[equal:],
            target_B[equal:],
            text_BLD[equal:],
        )
        length_B = 1000 * (sigma_B - target_B)[equal:]
        target[equal:] -= length_B.view(-1, 1, 1, 1, 1) * change

        # 3. Weighted squared error.
        u = mean_velocity(student, x, sigma_B, target_B, text_BLD)
        error_B = (u - target).square().flatten(1).mean(dim=1)
        return balanced(error_B * time_weight(sigma_B), equal)

    def saved_scores() -> dict[str, float]:
        average.save()
        return evaluate(average.module, teacher, count=16, seed=1, whole=False)

    # 2. Distil.
    fit(
        Fit(NAME, steps or STEPS, PEAK, work, every=40),
        student,
        loss_at,
        saved_scores,
    )
    # 3. Save the average, and measure what was saved.
    save(average.module, out)
    return {"steps": steps or STEPS, **measure_folder(out, teacher)}


def measure_folder(out: Path, teacher: Teacher) -> dict[str, float]:
    """Measure the flow map in ``out/anyflow`` in fp32, beside its teacher."""
    stored = load_pretrained(AnyFlowTransformer3DModel, out / NAME / "transformer")
    return evaluate(stored.float().eval(), teacher, count=96, seed=2)


def save(student: AnyFlowTransformer3DModel, out: Path) -> None:
    """Write ``out/anyflow`` in fp16; parts that are the teacher's are links to ``out/wan``."""
    # What is its own.
    folder = out / NAME
    half = copy.deepcopy(student).half()
    half.save_pretrained(folder / "transformer")
    for file in (folder / "transformer").iterdir():
        give_usual_mode(file)
    FlowMapEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
    # What it shares.
    for part in SHARED:
        if not (folder / part).exists():
            (folder / part).symlink_to(Path("..") / "wan" / part)

    # Read as users do, so that model_index.json is the library's own.
    index = AnyFlowPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=load_pretrained(UMT5EncoderModel, folder / "text_encoder"),
        vae=load_pretrained(AutoencoderKLWan, folder / "vae"),
        transformer=half,
        scheduler=FlowMapEulerDiscreteScheduler(shift=SHIFT),
    )
    index.save_config(folder)


def main() -> None:
    """Measure the shipped flow map and write the numbers."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--shapes", type=Path, default=Path("assets/shapes"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)

    # The settings are those of the build.
    built = json.loads((args.shapes / f"{NAME}.measured.json").read_text())
    result = {
        "command": "python toy/build_anyflow.py --out docs/results/anyflow.json",
        "steps": built["steps"],
        "batch": BATCH,
        "learning_rate": PEAK,
        "guidance": GUIDANCE,
        "measured": measure_folder(args.shapes, Teacher.load(args.shapes / "wan")),
    }
    text = json.dumps(result, indent=1) + "\n"
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
