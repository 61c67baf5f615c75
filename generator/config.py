"""What a Wan generator is built from. No torch here: a wrong value must be an error within two seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

WAN_LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")


def _check(owner: str, problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(f"{owner}.{problem}" for problem in problems))


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter: W + (alpha / rank) B A, in fp32 whatever the dtype of W. Defaults: 2510.22200 Table 9.

    targets  suffixes of linear layers; these six are all linears of self-attention, cross-attention and feed-forward
    init     of A: "gaussian" is N(0, 1 / rank^2), "kaiming" is uniform; B is zero either way
    """

    rank: int = 128
    alpha: float = 64.0
    targets: tuple[str, ...] = WAN_LINEARS
    init: Literal["gaussian", "kaiming"] = "gaussian"

    def __post_init__(self) -> None:
        problems = []
        if self.rank < 1:
            problems.append(f"rank must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            problems.append(f"alpha must be positive, got {self.alpha}")
        if not self.targets:
            problems.append("targets must name at least one linear layer, got none")
        _check("LoraConfig", problems)


@dataclass(frozen=True)
class SamplerConfig:
    """How a prompt becomes a group of latents. Defaults: LongCat-Video 2510.22200, section 3.3.1 and Table 9.

    num_steps         T, Euler steps from sigma = 1 to 0
    shift             time shift of the sigma grid: 3 for 480p, 5 for 720p
    stochastic        which steps add noise: "one" drawn for each group, a moving "window", or "all", among steps
                      stochastic_first..stochastic_range-1, see `generator.schedule.stochastic_steps`
    stochastic_range  T', where those end; 0 is the noisiest step
    window_size, window_every  of "window": its width, and the training steps after which it moves by one
    initial_noise     "shared" by the members of a group, or one for each "member"
    kernel            of a stochastic step: "sde" (Flow-GRPO, LongCat-Video) or "cps" (Flow-CPS)
    noise_level       a in s = a sqrt(sigma / (1 - sigma)), or eta in [0, 1] of cps; 0 is deterministic
    max_std           tau, ceiling of the noise an sde step adds; null leaves s unbounded near sigma = 1
    guidance_scale    classifier-free guidance; 1 is one forward instead of two
    tail_steps        steps after the last stochastic one, on a grid of their own; null keeps the grid's
    tail_solver       of those: "euler", or "ab2", the second-order Adams-Bashforth method at the same cost
    tail_guidance     guidance of those; null keeps guidance_scale, 1 halves their cost
    tail_cache        of those, every n-th runs all blocks of the transformer, others the first and the last only, and
                      use again what the rest added (`generator.block_cache`); 1 runs all every time
    """

    num_steps: int = 16
    shift: float = 3.0
    stochastic: Literal["one", "window", "all"] = "one"
    stochastic_first: int = 0
    stochastic_range: int = 6
    window_size: int = 4
    window_every: int = 25
    initial_noise: Literal["shared", "member"] = "shared"
    kernel: Literal["sde", "cps"] = "sde"
    noise_level: float = 1.0
    max_std: float | None = 0.45
    guidance_scale: float = 4.5
    negative_prompt: str = ""
    tail_steps: int | None = None
    tail_solver: Literal["euler", "ab2"] = "euler"
    tail_guidance: float | None = None
    tail_cache: int = 1

    def __post_init__(self) -> None:
        sizes = ("num_steps", "window_size", "window_every", "tail_steps", "tail_cache")
        counts = {name: getattr(self, name) for name in sizes}
        problems = [
            f"{n} must be at least 1, got {count}"
            for n, count in counts.items()
            if count is not None and count < 1
        ]
        if self.shift <= 0:
            problems.append(f"shift must be positive, got {self.shift}")
        if not 1 <= self.stochastic_range <= self.num_steps:
            problems.append(
                f"stochastic_range must be in 1..num_steps={self.num_steps}, got {self.stochastic_range}"
            )
        if self.noise_level < 0:
            problems.append(f"noise_level must be at least 0, got {self.noise_level}")
        if self.max_std is not None and self.max_std <= 0:
            problems.append(f"max_std must be positive or null, got {self.max_std}")
        if not 0 <= self.stochastic_first < self.stochastic_range:
            problems.append(
                f"stochastic_first must be in 0..{self.stochastic_range - 1} (stochastic_range - 1), "
                f"got {self.stochastic_first}"
            )
        elif (
            self.stochastic == "window"
            and self.window_size > self.stochastic_range - self.stochastic_first
        ):
            room = f"stochastic_range - stochastic_first = {self.stochastic_range - self.stochastic_first}"
            problems.append(
                f"window_size must be at most {room}, got {self.window_size}"
            )
        problems += self._kernel_problems()
        scales = {
            name: getattr(self, name) for name in ("guidance_scale", "tail_guidance")
        }
        problems += [
            f"{n} must be at least 1, got {scale}"
            for n, scale in scales.items()
            if scale is not None and scale < 1
        ]
        _check("SamplerConfig", problems)

    def _kernel_problems(self) -> list[str]:
        if self.kernel == "sde":
            if (
                self.max_std is None
                and self.noise_level > 0
                and self.stochastic_first == 0
            ):
                # step 0 starts at sigma = 1, and there the unbounded s is infinite
                return [
                    f"max_std must be a number when noise_level is {self.noise_level} and stochastic_first 0, got null"
                ]
            return []
        problems = []
        if self.noise_level > 1:
            problems.append(
                f"noise_level must be at most 1 with kernel cps, got {self.noise_level}"
            )
        if self.max_std is not None:
            problems.append(
                f"max_std must be null with kernel cps, which has no ceiling, got {self.max_std}"
            )
        if self.stochastic_range >= self.num_steps:
            problems.append(
                f"stochastic_range must be below num_steps, the last step of cps is exact, got {self.stochastic_range}"
            )
        return problems

    @property
    def steps_per_group(self) -> int:
        """How many stochastic steps a group has."""
        sizes = {
            "one": 1,
            "window": self.window_size,
            "all": self.stochastic_range - self.stochastic_first,
        }
        return sizes[self.stochastic]


@dataclass(frozen=True)
class GeneratorConfig:
    """A WanPipeline folder and how to run it.

    path                    folder in the `WanPipeline.from_pretrained` layout, or a hub name
    height, width           pixels; multiples of (VAE spatial factor x patch), checked against the VAE when it is loaded
    num_frames, fps         frames per video, one more than a multiple of the VAE's temporal factor, and their rate
    dtype                   of the frozen transformer and text encoder; the VAE, the adapter and latents are fp32.
                            Without an adapter, of all weights, which are in fp32 in DeepSpeed's optimizer as well
    lora                    null trains every weight of the transformer
    gradient_checkpointing  recompute each block in the backward pass
    compile                 torch.compile of the transformer's blocks: the first call of every shape takes a minute
    decode_batch            videos per VAE call; null is all that are there. Halved for good when memory runs out
    rollout_batch           latents per forward while sampling (twice as many samples under guidance); null is a whole
                            group. Halved for good when memory runs out, but not under ZeRO 3
    guidance_in_update      False computes `transition` from the conditional branch alone, at half the cost: it trains
                            another law than the guided one that sampled, so first-pass ratios are not 1
    max_sequence_length     text tokens after padding; attention is unmasked, so the padding is part of the model
    """

    path: str
    height: int = 480
    width: int = 832
    num_frames: int = 81
    fps: float = 16.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    gradient_checkpointing: bool = True
    compile: bool = False
    decode_batch: int | None = 1
    rollout_batch: int | None = 4
    guidance_in_update: bool = True
    max_sequence_length: int = 512

    def __post_init__(self) -> None:
        sizes = (
            "height",
            "width",
            "num_frames",
            "fps",
            "decode_batch",
            "rollout_batch",
            "max_sequence_length",
        )
        given = {name: getattr(self, name) for name in sizes}
        problems = [
            f"{n} must be positive, got {value}"
            for n, value in given.items()
            if value is not None and value <= 0
        ]
        if not self.path:
            problems.append("path must name a WanPipeline folder, got an empty string")
        _check("GeneratorConfig", problems)
