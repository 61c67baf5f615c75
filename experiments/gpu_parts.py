"""What `experiments/gpu_check.py` measures at full size: random weights, one GPU, no downloads.

Each part runs in its process and returns figures for the JSON: rates by name of
`launch.planning.roofline.Rates`, measured figures, and why others are left out.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoTokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from alignment.rewards.brightness import Brightness
from common.config import load
from common.distributed import seeded_generator
from common.types import Score
from experiments.gpu_rates import (
    RateSizes,
    first_line,
    flat,
    measure_rates,
    seconds_of,
    wait_for,
)
from experiments.runner import ROOT
from generator import adapter
from generator.attention import backend, require_backend
from generator.config import (
    FORWARD_ONLY_ATTENTION,
    TRAINABLE_ATTENTION,
    GeneratorConfig,
)
from generator.latents import store_channels_last
from generator.pipeline import compile_blocks
from generator.wan import WanGenerator
from launch.planning.known_models import QWEN3_VL, WAN, WAN_VAE
from launch.schemas.training import ColdStartRun, GrpoRun
from launch.training import grpo_loop
from rm.model import DeScore
from rm.prompt import DEFAULT_TEMPLATE, VIDEO_PAD, token_id
from rm.scorer import DeScoreScorer

PROMPT = "A paper boat drifts down a gutter in the rain."
WAN_NAME = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
TEXT_TOKENS = 24
GIB = 2.0**30
# Of NPUs and ROCm, and one that stores the scores of all tokens.
OTHERS = {"_native_npu", "aiter_fa2_hub", "_native_math"}
BACKENDS = tuple(
    name
    for name in (*TRAINABLE_ATTENTION, *FORWARD_ONLY_ATTENTION)
    if name not in OTHERS
)
# They only describe memory.
NO_KERNELS = {
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
}
# What a missing package, kernel or download raises.
UNAVAILABLE = (
    ValueError,
    RuntimeError,
    NotImplementedError,
    ImportError,
    OSError,
    AssertionError,
)
# The limits of two CoTs; a CoT that does not end is written to twice its limit.
SHORT_COT = 8
LONG_COT = 32


@dataclass(frozen=True)
class Subject:
    """The models that are measured, and how large.

    wan, vae, qwen  configs of the models' classes.
    words   overrides of configs/wan/grpo.yaml.
    rates   sizes of the kernels.
    backends  attention backends that are tried.
    """

    wan: Mapping[str, Any]
    vae: Mapping[str, Any]
    qwen: Mapping[str, Any]
    words: tuple[str, ...] = ()
    rates: RateSizes = field(default_factory=RateSizes)
    backends: tuple[str, ...] = BACKENDS


@dataclass(frozen=True)
class PartResult:
    """Figures of a part by name, see the module."""

    rates: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def published(device: torch.device) -> Subject:
    """Wan 2.1 1.3B and Qwen3-VL 8B, or 2B where 8B has no room for a KV cache."""
    size = "8B"
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 40 * GIB:
        size = "2B"
    return Subject(WAN[WAN_NAME], WAN_VAE, QWEN3_VL[f"Qwen/Qwen3-VL-{size}-Instruct"])


# ------------------------------------------------------------------ parts


def rates(subject: Subject, device: torch.device) -> PartResult:
    """Measure kernels by themselves."""
    found = measure_rates(subject.rates, device)
    return PartResult(rates=found.rates, left_out=found.left_out)


def dit(subject: Subject, device: torch.device) -> PartResult:
    """Time a forward of the transformer by backend, and see whether it repeats its bits."""
    cfg = run_config(subject).generator
    generator = random_wan(subject, cfg, device, vae=False)
    transformer = generator.transformer
    inputs = dit_inputs(generator, latent_shape(cfg))
    measured: dict[str, Any] = {}
    left_out = {}

    # 1. Each attention backend, with the adapter and without.
    @torch.no_grad()
    def forward() -> Tensor:
        return generator.module(**inputs, return_dict=False)[0]

    for name in subject.backends:
        key = f"dit_forward_s/{name}"
        try:
            require_backend("attention", name, device)
            with backend(transformer, name):
                measured[key] = seconds_of(forward, device)
        except UNAVAILABLE as error:
            left_out[key] = first_line(error)
    with generator.reference():
        measured["dit_forward_s/without adapter"] = seconds_of(forward, device)

    # 2. The same bits again, forward and gradient.
    measured["repeats/forward"] = torch.equal(forward(), forward())
    gradients = [gradient_of(generator.module, inputs) for _ in range(2)]
    measured["repeats/gradient"] = torch.equal(*gradients)

    # 3. A forward so small that Python's part is all of it.
    small = dit_inputs(generator, (transformer.config.in_channels, 1, 4, 4))

    @torch.no_grad()
    def small_forward() -> Tensor:
        return generator.module(**small, return_dict=False)[0]

    host = seconds_of(small_forward, device)
    with CountKernels() as counter:
        small_forward()
    rates = {"host": host / counter.count}

    # 4. Compiled blocks come last, because they stay compiled.
    try:
        compile_blocks(transformer)
        measured["dit_forward_s/compiled"] = seconds_of(forward, device)
    except UNAVAILABLE as error:
        left_out["dit_forward_s/compiled"] = first_line(error)
    return PartResult(rates, measured, left_out)


def decode(subject: Subject, device: torch.device) -> PartResult:
    """Time the VAE's decoding of a video, in fp32 and in bfloat16 with channels last."""
    exact = decode_in("float32", subject, device)
    fast = decode_in("bfloat16", subject, device)
    measured = {}
    for name, timed in (("float32", exact), ("bfloat16", fast)):
        measured[f"decode_s/{name}"] = timed.seconds
        measured[f"decode_peak_gib/{name}"] = timed.peak_gib
    # in steps of 1 / 255, with random weights
    difference = fast.video_BTYXC.float() - exact.video_BTYXC.float()
    measured["decode_error/bfloat16"] = float(difference.abs().mean())
    return PartResult(measured=measured)


@dataclass(frozen=True)
class TimedDecode:
    """A decoded video, its seconds, and the peak of memory."""

    video_BTYXC: Tensor
    seconds: float
    peak_gib: float


def decode_in(dtype: str, subject: Subject, device: torch.device) -> TimedDecode:
    """Decode a random latent by a VAE of this dtype."""
    cfg = dataclasses.replace(
        run_config(subject).generator,
        vae_dtype=dtype,
        vae_channels_last=dtype == "bfloat16",
    )
    generator = random_wan(subject, cfg, device)
    source = seeded_generator("gpu check")
    latent = torch.randn((1, *generator.latent_shape), generator=source)
    with peak_of(device) as peak:
        seconds = seconds_of(lambda: generator.decode(latent), device, repeats=1)
    return TimedDecode(generator.decode(latent), seconds, peak.gib)


def reward_model(subject: Subject, device: torch.device) -> PartResult:
    """Time the reward model: reading a video, and a token of its chain of thought."""
    cfg = run_config(subject).generator
    model = random_descore(subject, device)
    source = seeded_generator("gpu check")
    video = torch.randint(
        0,
        256,
        (1, cfg.num_frames, cfg.height, cfg.width, 3),
        generator=source,
        dtype=torch.uint8,
    )

    def score(cots: int, limit: int) -> None:
        model.generation = dataclasses.replace(model.generation, max_new_tokens=limit)
        found = DeScoreScorer(model, cots=cots).score(video, [PROMPT], fps=cfg.fps)
        if cots:
            require_cut(found)

    with peak_of(device) as peak:
        without = seconds_of(lambda: score(0, SHORT_COT), device)
        short = seconds_of(lambda: score(1, SHORT_COT), device)
        long = seconds_of(lambda: score(1, LONG_COT), device)
    # written to twice the limit, by random weights that never end
    tokens = 2 * (LONG_COT - SHORT_COT)
    return PartResult(
        measured={
            "reward_model_parameters": sum(p.numel() for p in model.parameters()),
            "reward_model_s/without CoT": without,
            "reward_model_ms_a_token": 1000 * (long - short) / tokens,
            "reward_model_peak_gib": peak.gib,
        }
    )


def require_cut(found: Score) -> None:
    """Raise RuntimeError for a CoT that ended before its limit: its tokens are unknown."""
    # a CoT that the limit cut has no score
    if not bool(found.value_B.isnan().all()):
        raise RuntimeError("a random CoT has ended, so that its tokens are unknown")


def update(subject: Subject, device: torch.device) -> PartResult:
    """Make two GRPO updates of a short rollout; the second is measured."""
    words = [
        "prompts_per_step=1",
        "generator.sampler.num_steps=3",
        "generator.sampler.stochastic_range=1",
    ]
    cfg = run_config(subject, *words)
    generator = random_wan(subject, cfg.generator, device)
    loop = grpo_loop.loop_of(cfg, [PROMPT], generator, {"brightness": Brightness()})
    embeddings = {
        PROMPT: random_embedding(subject, 0),
        cfg.generator.sampler.negative_prompt: random_embedding(subject, 1),
    }
    with generator.given_prompts(embeddings), peak_of(device) as peak:
        loop.step(0)
        metrics = loop.step(1).metrics
    if metrics["train/skipped"]:
        raise RuntimeError("all videos have the same brightness: nothing was trained")
    measured = {"update_peak_gib": peak.gib}
    for phase in ("rollout", "decode", "update"):
        measured[f"grpo_s/{phase}"] = metrics[f"seconds/{phase}"]
    # Before the second step nothing but the first has moved the weights.
    measured["ratio_max_dev"] = metrics["train/ratio_max_dev"]
    measured["grad_norm"] = metrics["train/grad_norm"]
    return PartResult(measured=measured)


# ------------------------------------------------------------------ instruments


class CountKernels(TorchDispatchMode):
    """Counts operations that compute something, which views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # a view returns its input's memory without writing to it
        returns = func._schema.returns
        alias = returns[0].alias_info if returns else None
        is_view = alias is not None and not alias.is_write
        if not is_view and func._schema.name not in NO_KERNELS:
            self.count += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Peak:
    """The largest memory of tensors on the GPU, NaN without one."""

    gib: float = float("nan")


@contextmanager
def peak_of(device: torch.device) -> Iterator[Peak]:
    """Measure the peak inside the block."""
    peak = Peak()
    if device.type != "cuda":
        yield peak
        return
    torch.cuda.reset_peak_memory_stats(device)
    yield peak
    wait_for(device)
    peak.gib = torch.cuda.max_memory_allocated(device) / GIB


def gradient_of(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The gradient of a mean square, in a row."""
    trained = [p for p in module.parameters() if p.requires_grad]
    out = module(**inputs, return_dict=False)[0]
    return flat(list(torch.autograd.grad(out.float().square().mean(), trained)))


# ------------------------------------------------------------------ random models


def run_config(subject: Subject, *words: str) -> GrpoRun:
    """configs/wan/grpo.yaml with brightness as its reward."""
    cfg = load(
        GrpoRun,
        ROOT / "configs/wan/grpo.yaml",
        [
            f"run_dir={tempfile.gettempdir()}",
            "rewards.brightness.weight=1",
            *subject.words,
            *words,
        ],
    )
    return dataclasses.replace(cfg, rewards={"brightness": cfg.rewards["brightness"]})


def latent_shape(cfg: GeneratorConfig) -> tuple[int, ...]:
    """(C, F, H, W) of a video of Wan 2.1, whose VAE compresses by 8 and 4."""
    frames = (cfg.num_frames - 1) // 4 + 1
    return (16, frames, cfg.height // 8, cfg.width // 8)


def dit_inputs(generator: WanGenerator, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """A random latent of this shape with a random prompt, as the transformer takes them."""
    transformer = generator.transformer
    dtype = transformer.patch_embedding.weight.dtype
    source = seeded_generator("gpu check", *shape)
    latent = torch.randn((1, *shape), generator=source)
    length = generator.cfg.max_sequence_length
    text = torch.randn((1, length, transformer.config.text_dim), generator=source)
    return {
        "hidden_states": latent.to(generator.device, dtype),
        "timestep": torch.full((1,), 500.0, device=generator.device),
        "encoder_hidden_states": text.to(generator.device, dtype),
    }


def random_wan(
    subject: Subject,
    cfg: GeneratorConfig,
    device: torch.device,
    *,
    vae: bool = True,
) -> WanGenerator:
    """Make a Wan with random weights on the device, without a text encoder."""
    torch.manual_seed(0)
    with device:
        transformer = WanTransformer3DModel.from_config(dict(subject.wan)).eval()
        # The last layer starts as zeros, which would hide the layers before it.
        nn.init.normal_(transformer.proj_out.weight, std=0.02)
    store_as_loaded(transformer, getattr(torch, cfg.dtype))
    if cfg.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    decoder = None
    if vae:
        with device:
            decoder = AutoencoderKLWan.from_config(dict(subject.vae)).eval()
        decoder.requires_grad_(requires_grad=False)
        store_as_loaded(decoder, getattr(torch, cfg.vae_dtype))
        if cfg.vae_channels_last:
            store_channels_last(decoder)

    # Prompts are given as embeddings.
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=decoder,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=cfg.sampler.shift),
    )
    module = adapter.attach(transformer, cfg.lora, seed=0).eval()
    return WanGenerator(cfg, pipeline, module.to(device), device)


def store_as_loaded(model: ModelMixin, dtype: torch.dtype) -> None:
    """Give weights the dtypes that diffusers' loading gives them: a few stay fp32."""
    kept = model._keep_in_fp32_modules or []
    for name, parameter in model.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)


def random_descore(subject: Subject, device: torch.device) -> DeScore:
    """Make a DeScore with random weights in bfloat16 and a small tokenizer."""
    torch.manual_seed(0)
    folder = ROOT / "assets" / "shapes" / "qwen"
    tokenizer = AutoTokenizer.from_pretrained(folder.as_posix())
    config = Qwen3VLConfig(
        **subject.qwen, video_token_id=token_id(tokenizer, VIDEO_PAD)
    )
    settings = load(
        ColdStartRun,
        ROOT / "configs/wan/cold_start.yaml",
        ["base=x", "run_dir=x", "data.train=none.csv"],
    )
    # Videos are cut as the vision tower reads them.
    tower = config.vision_config
    video = dataclasses.replace(
        settings.video,
        patch_size=tower.patch_size,
        merge_size=tower.spatial_merge_size,
        temporal_patch_size=tower.temporal_patch_size,
    )

    # Random weights are drawn on the device, in their dtype.
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            qwen = Qwen3VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)
    return DeScore(
        qwen,
        tokenizer,
        DEFAULT_TEMPLATE,
        video,
        max(tokenizer.get_vocab().values()) + 1,
        settings.generation,
    )


def random_embedding(subject: Subject, seed: int) -> Tensor:
    """Draw the text encoder's output for a prompt: (L, D) without padding."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(TEXT_TOKENS, subject.wan["text_dim"], generator=draw)


PARTS = {part.__name__: part for part in (rates, dit, decode, reward_model, update)}


def measure(name: str, subject: Subject, device: torch.device) -> dict[str, Any]:
    """Run a part; return its figures and its seconds."""
    began = time.time()
    found = dataclasses.asdict(PARTS[name](subject, device))
    return {**found, "seconds": round(time.time() - began, 1)}
