"""Settings of a Wan generator. No torch: a wrong value must be an error in two seconds."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from common.plugin_file import check_target, file_of
from common.schema import (
    NonEmptyText,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    config,
)

WAN_LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")

GuidanceScale = Annotated[float, Field(ge=1.0)]

# diffusers' names of attention backends. These have a backward pass.
TRAINABLE_ATTENTION = (
    "native",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "_native_math",
    "_native_npu",
    "flash",
    "flash_hub",
    "_flash_3_hub",
    "aiter_fa2_hub",
    "xformers",
)
# These have none, or none that diffusers states. Those of sage compute in int8.
FORWARD_ONLY_ATTENTION = (
    "_flash_3",
    "flash_4_hub",
    "sage",
    "sage_hub",
    "sage_blackwell_hub",
    "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90",
    "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
)


def check_attention(key: str, name: str | None, *, forward_only: bool = False) -> None:
    """Raise ValueError for an unknown attention backend, or one without a needed backward pass."""
    if name is None or name in TRAINABLE_ATTENTION:
        return
    if name not in FORWARD_ONLY_ATTENTION:
        known = (*TRAINABLE_ATTENTION, *FORWARD_ONLY_ATTENTION)
        raise ValueError(f"{key}={name} is unknown; known are {', '.join(known)}")
    if not forward_only:
        raise ValueError(
            f"{key}={name} has no backward pass; only sampler.tail_attention may name it"
        )


@config
class LoraConfig:
    """A low-rank adapter: W + (alpha / rank) B A, in fp32 whatever the dtype of W.

    Defaults are those of LongCat-Video (2510.22200, Table 9).

    targets  suffixes of linear layers in the blocks. The default names all linears of
             self-attention, cross-attention and feed-forward; add_k_proj and add_v_proj are
             those of an image's tokens in Wan 2.1 I2V.
    init     of A: "gaussian" is N(0, 1 / rank^2), "kaiming" is uniform. B starts at zero.
    compute_dtype  of the adapter's products with activations, in sampling and in the update.
             With bfloat16 its weights, gradients and optimizer state stay fp32.
    """

    rank: PositiveInt = 128
    alpha: PositiveFloat = 64.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = WAN_LINEARS
    init: Literal["gaussian", "kaiming"] = "gaussian"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


@config
class SamplerConfig:
    """How a prompt becomes a group of latents.

    Defaults are those of LongCat-Video (2510.22200, section 3.3.1 and Table 9).

    num_steps         T, Euler steps from sigma = 1 to 0.
    shift             time shift of the sigma grid: 3 for 480p, 5 for 720p.
    stochastic        which steps add noise, among stochastic_first..stochastic_range-1:
                      "one" that is drawn for each group, a moving "window", or "all".
                      "none" is for objectives without a density: the tail is the whole
                      rollout, from each member's own noise.
    stochastic_first  the first step that may add noise; 0 is the noisiest.
    stochastic_range  T', the step after the last that may add noise.
    window_size       steps in a "window".
    window_every      optimizer steps after which a "window" moves by one.
    initial_noise     "shared" by the members of a group, or drawn for each "member".
    kernel            of a stochastic step: "sde" (Flow-GRPO, LongCat-Video), "cps"
                      (Flow-CPS), or "anchor" of a flow map (`generator.flow.Kernel`).
    noise_level       a in s = a sqrt(sigma / (1 - sigma)), or eta in [0, 1] of cps, or the
                      share in [0, 1] of an anchor's noise. 0 is deterministic.
    max_std           tau, the ceiling of an sde or anchor step's noise; null leaves s
                      unbounded near sigma = 1, and an anchor's noise at sigma_next.
    guidance_scale    classifier-free guidance; 1 needs one forward instead of two.
    guidance_scale_2  guidance of the transformer for low noise, where a model has two
                      (Wan 2.2 A14B), as the stock pipeline names it; null takes
                      guidance_scale.
    prefix_steps      jumps of a flow map (AnyFlow) to the first stochastic step, at most; null
                      keeps the grid's steps.
    tail_steps        steps after the last stochastic step, on a grid of their own; null
                      keeps the remaining steps of the grid.
    tail_solver       solver of the tail: "euler", or "ab2", the second-order
                      Adams-Bashforth method at the same cost.
    tail_guidance     guidance scale of the tail; null keeps guidance_scale, 1 halves its
                      cost.
    tail_cache        in the tail, every n-th step runs all transformer blocks; the others
                      reuse what the middle blocks added (`generator.block_cache`). 1 turns
                      the cache off.
    merge_adapter     walk prefix and tail, and sample for evaluation, with W + (alpha / rank)
                      B A in a copy of each target's weight, rounded to its dtype. The
                      stochastic steps keep the adapter apart. Without an adapter it
                      changes nothing.
    attention         attention backend of prefix, tail and evaluation; null keeps
                      generator.attention.
    sample_steps      steps of evaluation and sampling, or jumps of a flow map; null takes
                      num_steps.
    tail_attention    attention backend of the tail; null keeps ``attention``. Only here a
                      backend without a backward pass is allowed, such as "sage" (int8).
    """

    num_steps: PositiveInt = 16
    shift: PositiveFloat = 3.0
    stochastic: Literal["one", "window", "all", "none"] = "one"
    stochastic_first: NonNegativeInt = 0
    stochastic_range: PositiveInt = 6
    window_size: PositiveInt = 4
    window_every: PositiveInt = 25
    initial_noise: Literal["shared", "member"] = "shared"
    kernel: Literal["sde", "cps", "anchor"] = "sde"
    noise_level: NonNegativeFloat = 1.0
    max_std: PositiveFloat | None = 0.45
    guidance_scale: GuidanceScale = 4.5
    guidance_scale_2: GuidanceScale | None = None
    negative_prompt: str = ""
    prefix_steps: PositiveInt | None = None
    tail_steps: PositiveInt | None = None
    tail_solver: Literal["euler", "ab2"] = "euler"
    tail_guidance: GuidanceScale | None = None
    tail_cache: PositiveInt = 1
    merge_adapter: bool = False
    attention: str | None = None
    tail_attention: str | None = None
    sample_steps: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_attention("sampler.attention", self.attention)
        check_attention(
            "sampler.tail_attention", self.tail_attention, forward_only=True
        )
        if self.stochastic_range > self.num_steps:
            raise ValueError(
                f"stochastic_range={self.stochastic_range} must be at most "
                f"num_steps={self.num_steps}"
            )
        if self.stochastic_first >= self.stochastic_range:
            raise ValueError(
                f"stochastic_first={self.stochastic_first} must be below "
                f"stochastic_range={self.stochastic_range}"
            )
        possible_steps = self.stochastic_range - self.stochastic_first
        if self.stochastic == "window" and self.window_size > possible_steps:
            raise ValueError(
                f"window_size={self.window_size} must be at most {possible_steps}, "
                "stochastic_range - stochastic_first"
            )
        if self.stochastic == "none" and self.initial_noise == "shared":
            raise ValueError(
                "stochastic=none needs initial_noise=member: without noise on the way the "
                "members of a group would be equal"
            )
        if self.kernel == "cps":
            self._check_cps()
        elif self.kernel == "anchor":
            self._check_anchor()
        elif (
            self.max_std is None and self.noise_level > 0 and self.stochastic_first == 0
        ):
            # Step 0 starts at sigma = 1, where the unbounded s is infinite.
            raise ValueError(
                "max_std must be a number when noise_level is above 0 and "
                "stochastic_first is 0, got null"
            )

    def _check_cps(self) -> None:
        if self.noise_level > 1:
            raise ValueError(
                f"noise_level={self.noise_level} must be at most 1 with kernel cps"
            )
        if self.max_std is not None:
            raise ValueError(
                f"max_std={self.max_std} must be null with kernel cps, which has no ceiling"
            )
        if self.stochastic_range >= self.num_steps:
            raise ValueError(
                f"stochastic_range={self.stochastic_range} must be below "
                f"num_steps={self.num_steps}: the last step of cps is deterministic"
            )

    def _check_anchor(self) -> None:
        if self.noise_level > 1:
            raise ValueError(
                f"noise_level={self.noise_level} must be at most 1 with kernel anchor"
            )
        if self.stochastic_range >= self.num_steps:
            raise ValueError(
                f"stochastic_range={self.stochastic_range} must be below "
                f"num_steps={self.num_steps}: noise is added up to the sigma after an anchor's "
                "step, which is 0 after the last one"
            )

    @property
    def solver_steps(self) -> int:
        """Return how many steps a rollout without stochastic steps has."""
        return min(self.num_steps, self.tail_steps or self.num_steps)

    @property
    def steps_per_group(self) -> int:
        """Return how many stochastic steps a group has."""
        if self.stochastic == "none":
            return 0
        if self.stochastic == "one":
            return 1
        if self.stochastic == "window":
            return self.window_size
        return self.stochastic_range - self.stochastic_first


@config
class ExpertsConfig:
    """The two transformers of a Wan 2.2 A14B: "high" denoises high noise, "low" the rest.

    train    which of them is trained; the other one is frozen. Stochastic steps must be
             those of the trained one.
    offload  the frozen one waits in the host's memory until a rollout or a sample needs it,
             and is copied to the device once for each.
    """

    train: Literal["high", "low"] = "high"
    offload: bool = True


@config
class GeneratorConfig:
    """A WanPipeline folder and how to run it.

    path                    folder in the layout of `WanPipeline.from_pretrained`, or a name
                            on the hub.
    height, width           pixels; multiples of the VAE's spatial factor times the patch
                            size, checked when the VAE is loaded.
    num_frames              frames of a video, one more than a multiple of the VAE's
                            temporal factor.
    fps                     frames per second of a video.
    dtype                   of the frozen transformer and prompt encoder. The adapter and
                            latents are fp32. Without an adapter it is the dtype of all
                            weights, which DeepSpeed's optimizer also holds in fp32.
    lora                    null trains every weight of the transformer.
    gradient_checkpointing  recompute each block in the backward pass.
    compile                 torch.compile the transformer's blocks. The first call of each
                            shape takes a minute.
    attention               attention backend of the transformer, by diffusers' name: native,
                            _native_cudnn, flash, _flash_3_hub and others. Null keeps the
                            process's (DIFFUSERS_ATTN_BACKEND, or native). Those of the hub
                            are downloaded and run.
    tf32                    fp32 matrix products of the whole process run in TF32 on CUDA;
                            elsewhere it changes nothing.
    vae_dtype               of the VAE. With bfloat16 videos are no longer WanPipeline's byte
                            for byte: in the embedded world pixels differ by at most 1 of 255.
    vae_channels_last       store the VAE's kernels with channels last, which is faster.
    scoring_decoder         folder of a small decoder (diffusers' AutoencoderTiny, of your own) that
                            makes the frames that rewards see in GRPO's training; evaluation,
                            samples and films keep the VAE. Its dtype is vae_dtype. Null is
                            the VAE everywhere (`generator.scoring_decoder`).
    decode_batch            videos in a VAE call; null decodes all together. Halved for the
                            rest of the run when memory runs out.
    rollout_batch           latents in a forward of sampling, twice as many samples with
                            guidance; null takes a whole group. Halved for the rest of the
                            run when memory runs out, but not with ZeRO 3.
    guidance_in_update      false computes the transition from the conditional branch alone,
                            at half the cost. It then differs from the guided transition
                            that sampled, so the first ratios are not 1.
    context_parallel        ranks that compute each sample together, each a part of its
                            tokens (`generator.context_parallel`): for videos whose forward
                            or update does not fit a GPU. It must divide the ranks, the
                            attention heads and the tokens; for training, without ZeRO 3.
    max_sequence_length     text tokens after padding. Attention has no mask, so the padding
                            is part of the model.
    experts                 of a model with two transformers (Wan 2.2 A14B); others have one,
                            which is trained.
    target                  path/to/file.py:Class of a generator of your own, instead of Wan, or
                            a name that an installed package offers as an entry point of
                            video_alignment.generators (`generator.plugin`). It is called with
                            this config and a seed, and what the keys above mean is its choice.
    """

    path: NonEmptyText
    height: PositiveInt = 480
    width: PositiveInt = 832
    num_frames: PositiveInt = 81
    fps: PositiveFloat = 16.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    gradient_checkpointing: bool = True
    compile: bool = False
    attention: str | None = None
    tf32: bool = False
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    vae_channels_last: bool = False
    scoring_decoder: NonEmptyText | None = None
    decode_batch: PositiveInt | None = 1
    rollout_batch: PositiveInt | None = 4
    guidance_in_update: bool = True
    context_parallel: Literal[1, 2, 4, 8] = 1
    max_sequence_length: PositiveInt = 512
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    target: str | None = None

    def __post_init__(self) -> None:
        check_attention("generator.attention", self.attention)
        if self.target is not None and ":" in self.target:
            check_target("generator.target", self.target)
        if self.target is not None and self.scoring_decoder is not None:
            raise ValueError(
                f"generator.scoring_decoder={self.scoring_decoder} decodes Wan's latents, and "
                f"generator.target={self.target} is another generator: leave the key out"
            )
        if self.target is not None and self.context_parallel > 1:
            raise ValueError(
                f"generator.context_parallel={self.context_parallel} is of Wan, and "
                f"generator.target={self.target} is another generator"
            )

    @property
    def source(self) -> str:
        """What is loaded, for messages: the target, or the path of a Wan."""
        return self.path if self.target is None else self.target

    @property
    def target_file(self) -> str | None:
        """The file of ``target``; None for Wan and for an installed package."""
        if self.target is None or ":" not in self.target:
            return None
        return file_of(self.target)


def check_one_rank_per_video(cfg: GeneratorConfig) -> None:
    """Raise ValueError if ranks shall share a video that each of them samples by itself."""
    if cfg.context_parallel > 1:
        raise ValueError(
            f"generator.context_parallel={cfg.context_parallel} is for training: here every "
            "rank samples videos of its own, so it must be 1"
        )


def check_wan(cfg: GeneratorConfig, what: str) -> None:
    """Raise ValueError for a generator of another class, where only Wan will do."""
    if cfg.target is not None:
        raise ValueError(
            f"generator.target={cfg.target} cannot be used here: {what} knows Wan only"
        )


def check_vae_decodes(cfg: GeneratorConfig, what: str) -> None:
    """Raise ValueError for a small decoder where videos are scored by the VAE's frames only."""
    if cfg.scoring_decoder is not None:
        raise ValueError(
            f"generator.scoring_decoder={cfg.scoring_decoder} is for the rewards of GRPO's "
            f"training, and {what} scores the VAE's frames: leave the key out"
        )


def check_zero_stage(cfg: GeneratorConfig, zero_stage: int) -> None:
    """Raise ValueError for ZeRO 3, which gathers weights, where ranks share tokens."""
    if zero_stage == 3 and cfg.context_parallel > 1:
        raise ValueError(
            f"generator.context_parallel={cfg.context_parallel} needs zero_stage 0, 1 or 2, "
            "got 3: gathering weights between exchanges of tokens is not tested"
        )
