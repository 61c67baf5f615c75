"""Build the models of a plan without weights, and measure their sizes and what calls cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.files import read_json
from common.shipped import shipped
from common.types import ImagePrompt, Prompt
from generator.conditions import ImageCondition
from launch.planning import known_models
from launch.planning.meter import Cost, Meter

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, AutoencoderTiny, WanTransformer3DModel
    from torch import Tensor, nn

    from generator.config import GeneratorConfig
    from generator.wan import WanGenerator
    from launch.schemas.training import GrpoRun
    from rm.config import BackboneLora, Generation, LearningRates, VideoSettings
    from rm.model import Batch, DeScore
    from rm.prompt import Encoded
    from rm.video import PreparedVideo

# Token counts of the released runs: DeScore's instruction with its prompt, a chain of thought
PROMPT_TOKENS = 500
COT_TOKENS = 800
# What is generated and scored: its text does not matter.
PROMPT = "A paper boat drifts down a gutter in the rain."
EMBEDDED_TOKENS = 40
# The image is never read: its condition has shapes only.
IMAGE = "image.png"
# Of CLIP ViT-H/14 at 224 pixels: 16 x 16 patches and the class.
CLIP_TOKENS = 257
# Any id that is no special token.
_WORD = 65
# Of the released settings.
_PENALTY = 1.05
# So many seeds find every place of the stochastic steps.
_TRIED = 64
# No text is read, so that any tokenizer serves.
_TOKENIZER = "assets/shapes/qwen"


@dataclass(frozen=True)
class Sizes:
    """Parameters of a module, and the bytes of its weights in their data types."""

    parameters: int
    trained: int
    bytes: int
    trained_bytes: int


def sizes_of(module: nn.Module) -> Sizes:
    """Count parameters and bytes, SUM over all parameters and over those with a gradient."""
    parameters = list(module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return Sizes(
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() for parameter in trained),
        sum(parameter.nbytes for parameter in parameters),
        sum(parameter.nbytes for parameter in trained),
    )


class MetaWan:
    """Transformer, VAE and text encoder of a `GeneratorConfig`, without weights.

    meter  Measures calls; None where only sizes are asked for.
    """

    def __init__(self, cfg: GeneratorConfig, meter: Meter | None = None) -> None:
        self.cfg = cfg
        self.meter = meter
        self.dtype = getattr(torch, cfg.dtype)
        self._published = cfg.path in known_models.WAN
        self.family = known_models.wan_family(cfg.path)

    @cached_property
    def transformer(self) -> WanTransformer3DModel:
        """The transformer that is trained, without adapter, in the data types of a run."""
        module = self._bare_transformer()
        if self.cfg.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        return module

    @cached_property
    def frozen(self) -> WanTransformer3DModel | None:
        """The other one of two transformers; None for a model with a single one."""
        if self.family.boundary is None:
            return None
        return self._bare_transformer().requires_grad_(requires_grad=False).eval()

    def _bare_transformer(self) -> WanTransformer3DModel:
        from diffusers import AnyFlowTransformer3DModel, WanTransformer3DModel

        from generator import attention
        from generator.flow_map import IN_FP32

        # Weights are not needed, only shapes.
        known = known_models.WAN.get(self.cfg.path)
        config = _config_of(self.cfg.path, "transformer", known)
        kind = WanTransformer3DModel
        if self.family.flow_map:
            kind = AnyFlowTransformer3DModel
        with torch.device("meta"):
            module = kind.from_config(config)
        attention.set_backend(module, self.cfg.attention)

        # diffusers loads some modules in fp32; a run that trains all weights holds one dtype.
        in_fp32: set[str] = set()
        if self.cfg.lora is not None:
            in_fp32.update(module._keep_in_fp32_modules or ())
            if self.family.flow_map:
                in_fp32.update(IN_FP32)
        for name, parameter in module.named_parameters():
            wide = not in_fp32.isdisjoint(name.split("."))
            parameter.data = parameter.data.to(torch.float32 if wide else self.dtype)
        return module

    @cached_property
    def module(self) -> nn.Module:
        """The transformer as a run trains it: with its adapter, or all of it."""
        from generator import adapter

        if self.cfg.lora is None:
            # Without an adapter all weights are trained.
            return self.transformer.requires_grad_(requires_grad=True).eval()
        with torch.device("meta"):
            return adapter.attach(self.transformer, self.cfg.lora, seed=0).eval()

    @cached_property
    def vae(self) -> AutoencoderKLWan:
        """The VAE, in its dtype."""
        from diffusers import AutoencoderKLWan

        # A folder has its config.
        known = known_models.wan_vae(self.cfg.path) if self._published else None
        config = _config_of(self.cfg.path, "vae", known)
        return self._decoder(AutoencoderKLWan, config)

    @cached_property
    def small_decoder(self) -> AutoencoderTiny | None:
        """The decoder for rewards, in the VAE's dtype; a folder that is not there is TAESD's size.

        None where the VAE decodes for them.
        """
        from diffusers import AutoencoderTiny

        if self.cfg.scoring_decoder is None:
            return None
        known = None
        if not Path(self.cfg.scoring_decoder).is_dir():
            known = known_models.small_decoder(self.vae.config)
        config = _config_of(self.cfg.scoring_decoder, ".", known)
        return self._decoder(AutoencoderTiny, config)

    def _decoder(self, kind: type, config: Mapping[str, Any]) -> Any:
        """A frozen VAE of a diffusers class on the meta device, in the VAE's dtype."""
        with torch.device("meta"):
            model = kind.from_config(config)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, self.cfg.vae_dtype))
        return model.requires_grad_(requires_grad=False).eval()

    @cached_property
    def text_encoder(self) -> nn.Module:
        """The text encoder, UMT5."""
        from transformers import UMT5Config, UMT5EncoderModel

        known = known_models.UMT5_XXL if self._published else None
        config = UMT5Config(**_config_of(self.cfg.path, "text_encoder", known))
        with torch.device("meta"):
            return UMT5EncoderModel(config).to(self.dtype)

    @cached_property
    def generator(self) -> WanGenerator:
        """The generator of a run, whose calls with equal shapes are measured twice at most."""
        from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

        from generator.anyflow import class_for
        from generator.denoiser import Expert
        from generator.latents import store_channels_last
        from generator.pipeline import compile_blocks
        from generator.scoring_decoder import ScoringDecoder
        from launch.rehearsal.repeats import repeat_calls

        # As `WanGenerator.load` prepares them.
        gpu = self.meter.gpu
        module = self.module
        if self.cfg.compile:
            compile_blocks(self.transformer)
        if self.cfg.vae_channels_last:
            store_channels_last(self.vae)
        models = [self.transformer, self.vae]
        frozen = None
        if self.frozen is not None:
            frozen = Expert(self.frozen, self.frozen)
            models.append(self.frozen)
        for model in models:
            repeat_calls(gpu, model)
        pipeline = WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=self.vae,
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
        # Ranks that share tokens are not there: the plan divides by their number.
        cfg = replace(self.cfg, context_parallel=1)
        generator = class_for(self.family)(
            cfg, pipeline, module, gpu.device, family=self.family, frozen=frozen
        )
        if self.small_decoder is not None:
            if self.cfg.vae_channels_last:
                store_channels_last(self.small_decoder)
            repeat_calls(gpu, self.small_decoder)
            generator.scoring_decoder = ScoringDecoder(
                self.small_decoder,
                generator.codec,
                source=self.cfg.scoring_decoder,
                batch=self.cfg.decode_batch,
            )
        return generator

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, F, H, W) of the latent of a video."""
        from generator.latents import LatentCodec

        return LatentCodec(self.vae, batch=1).latent_shape(
            height=self.cfg.height,
            width=self.cfg.width,
            num_frames=self.cfg.num_frames,
            patch=self.transformer.config.patch_size,
        )

    @property
    def tokens(self) -> int:
        """Tokens of a video in the transformer."""
        _, frames, height, width = self.latent_shape
        # A token is a patch of the latent.
        t, y, x = self.transformer.config.patch_size
        return (frames // t) * (height // y) * (width // x)

    def forward(self, samples: int, *, grad: bool) -> Cost:
        """Measure the transformer on ``samples`` latents; ``grad`` includes the backward."""
        from generator.flow_map import mean_velocity

        # The prompt is padded to its longest length.
        text_shape = (
            samples,
            self.cfg.max_sequence_length,
            self.transformer.config.text_dim,
        )

        # An image is told in channels beside the latent, and by tokens of CLIP.
        config = self.transformer.config
        channels = config.in_channels
        images = {}
        if config.image_dim is not None:
            tokens = (samples, CLIP_TOKENS, config.image_dim)
            images["encoder_hidden_states_image"] = _meta(*tokens, dtype=self.dtype)

        def velocity() -> Tensor:
            if self.family.flow_map:
                x_BCFHW = _meta(samples, *self.latent_shape, dtype=self.dtype)
                time_B = _meta(samples)
                text_BLD = _meta(*text_shape, dtype=self.dtype)
                return mean_velocity(self.module, x_BCFHW, time_B, time_B, text_BLD)
            shape = (samples, channels, *self.latent_shape[1:])
            return self.module(
                hidden_states=_meta(*shape, dtype=self.dtype),
                timestep=_meta(samples),
                encoder_hidden_states=_meta(*text_shape, dtype=self.dtype),
                return_dict=False,
                **images,
            )[0]

        return _cost_of_pass(self.meter, self.module, velocity, grad=grad)

    def rollout(self, members: int) -> Cost:
        """Measure the rollout of a group, MEAN over where its stochastic steps may be."""
        # Steps follow from the seed, and those of a moving window from the iteration.
        how = self.cfg.sampler
        places = {}
        for i in range(_TRIED):
            iteration = i * (how.window_every or 1)
            steps = tuple(self.generator._walk(self.prompt, i, iteration).steps)
            places.setdefault(steps, (i, iteration))
        total = Cost()
        with self._given_prompts():
            for seed, iteration in places.values():
                total += self.meter.cost(
                    lambda seed=seed, iteration=iteration: self.generator.rollout(
                        [self.prompt],
                        group_size=members,
                        seeds=[seed],
                        iteration=iteration,
                    )
                )
        return total * (1 / len(places))

    def sample(self, videos: int) -> Cost:
        """Measure sampling videos for an evaluation or for pairs."""
        with self._given_prompts():
            return self.meter.cost(
                lambda: self.generator.sample([self.prompt] * videos, range(videos))
            )

    def update(self, cfg: GrpoRun, members: int) -> Cost:
        """Measure the losses and backwards of one group, of all of its stochastic steps."""
        if cfg.grpo.objective != "policy":
            return self._forward_update(cfg, members)
        from alignment.grpo_losses import weights_of_steps
        from alignment.policy_update import PolicyUpdate

        generator = self.generator
        objective = PolicyUpdate(cfg.grpo, generator=generator, engine=None)

        with self._given_prompts(), gradients_dropped(self.module):
            (group,) = generator.rollout([self.prompt], group_size=members, seeds=[0])
            weights = weights_of_steps(
                group.steps,
                form=cfg.grpo.reweight,
                normalize=cfg.grpo.normalize_step_weights,
            )

            def backward(place: int) -> None:
                output = objective.loss(
                    self.prompt,
                    group.steps[place],
                    torch.zeros(members),
                    weights[place],
                )
                output.loss.backward()

            # Only at the first step may members share their latent; the others cost the same.
            total = self.meter.cost(lambda: backward(0))
            others = len(group.steps) - 1
            if others:
                total += self.meter.cost(lambda: backward(1)) * others
            return total

    def _forward_update(self, cfg: GrpoRun, members: int) -> Cost:
        """Measure the losses and backwards of one group with a forward objective."""
        from alignment.forward_update import ForwardUpdate

        # The old policy costs a forward; its average is not needed for that.
        levels = [0.5] * cfg.grpo.forward.timesteps_per_sample
        objective = ForwardUpdate(
            cfg.grpo, generator=self.generator, engine=None, levels=levels
        )
        with self._given_prompts(), gradients_dropped(self.module):
            (group,) = self.generator.rollout([PROMPT], group_size=members, seeds=[0])
            batches = list(objective.noised(group, torch.zeros(members), 0))
            batch = batches[0]

            def backward() -> None:
                objective.loss(batch, None).loss.backward()

            total = self.meter.cost(backward)
            if cfg.grpo.has_old_policy:
                with torch.no_grad():
                    total += self.meter.cost(lambda: objective.velocity(batch))
            return total * len(batches)

    def flow_error(self, videos: int, *, reference: bool) -> Cost:
        """Measure the flow-matching error of ``videos`` latents, with its backward.

        ``reference`` is that of the reference policy, without a backward.
        """
        x_BCFHW = _meta(videos, *self.latent_shape)

        def error() -> Tensor:
            sigma_B = torch.full((videos,), 0.5)
            return self.generator.flow_error(
                x_BCFHW, x_BCFHW, sigma_B, [self.prompt] * videos
            )

        with self._given_prompts():
            if not reference:
                return _cost_of_pass(self.meter, self.module, error, grad=True)
            with torch.no_grad(), self.generator.reference():
                return self.meter.cost(error)

    def decode(self, videos: int) -> Cost:
        """Measure the decoder of rewards, from the latents of ``videos`` to pixels on the host."""
        latent_BCFHW = _meta(videos, *self.latent_shape)
        return self.meter.cost(lambda: self.generator.decode_to_score(latent_BCFHW))

    @property
    def prompt(self) -> Prompt:
        """The prompt of a plan, with an image where the model needs one."""
        return ImagePrompt(PROMPT, IMAGE) if self.family.needs_image else PROMPT

    def _given_image(self) -> None:
        """Put the condition of the image into the cache, as if it were encoded."""
        tokens_LD = None
        width = self.transformer.config.image_dim
        if width is not None:
            tokens_LD = torch.zeros(CLIP_TOKENS, width)
        latent_CFHW = torch.zeros(self.latent_shape)
        self.generator.images.give(IMAGE, ImageCondition(latent_CFHW, tokens_LD))

    def _given_prompts(self) -> AbstractContextManager[None]:
        """Embeddings of the prompt and of the negative prompt, as if they were cached."""
        if self.family.needs_image:
            self._given_image()
        width = self.transformer.config.text_dim
        tokens = min(EMBEDDED_TOKENS, self.cfg.max_sequence_length)
        embedding_LD = torch.zeros(tokens, width, dtype=self.dtype)
        texts = [PROMPT, self.cfg.sampler.negative_prompt]
        return self.generator.given_prompts(dict.fromkeys(texts, embedding_LD))


@dataclass(frozen=True)
class Lengths:
    """Token counts of a scored video and its texts.

    grid    Patches of the video before merging, as (t, h, w).
    video   Tokens of the video in the language model.
    prompt  Tokens of the instruction with the prompt.
    chain   Tokens of a chain of thought.
    """

    grid: tuple[int, int, int]
    video: int
    prompt: int = PROMPT_TOKENS
    chain: int = COT_TOKENS

    @property
    def prefix(self) -> int:
        """Tokens before the chain of thought."""
        return self.video + self.prompt

    @property
    def total(self) -> int:
        """Tokens of the sequence with a chain of thought."""
        return self.prefix + self.chain


def lengths_of(
    settings: VideoSettings,
    *,
    frames: int,
    fps: float,
    height: int,
    width: int,
) -> Lengths:
    """Count the tokens of a video as `rm.video.prepare` reads it."""
    from rm.video import frame_indices, smart_resize

    # Frames and pixels that the reward model reads.
    num_read = len(frame_indices(frames, fps, settings))
    y, x = smart_resize(
        num_read,
        height,
        width,
        settings,
    )
    t = -(-num_read // settings.temporal_patch_size)
    grid = (t, y // settings.patch_size, x // settings.patch_size)
    return Lengths(grid, t * grid[1] * grid[2] // settings.merge_size**2)


class MetaRewardModel:
    """A DeScore on a Qwen3-VL, without weights.

    name      A folder of a DeScore or of a Qwen3-VL, or a hub name. Where the folder does not
              exist, `known_models.closest_qwen3_vl` replaces it.
    settings  How it reads videos; None takes the folder's video.json, or the defaults.
    meter     Measures calls; None where only sizes are asked for.
    """

    def __init__(
        self,
        name: str,
        *,
        dtype: str,
        settings: VideoSettings | None = None,
        meter: Meter | None = None,
    ) -> None:
        from rm.config import VideoSettings

        # A model that does not exist yet is planned as a published one.
        there = name and Path(name).is_dir()
        self.name = name if there else known_models.closest_qwen3_vl(name)
        self.dtype = getattr(torch, dtype)
        self.meter = meter
        self.checkpointing = False

        file = Path(self.name, "video.json")
        if settings is None and file.is_file():
            settings = VideoSettings.load(file)
        self.settings = settings or VideoSettings()

    @cached_property
    def model(self) -> DeScore:
        """The reward model with its head."""
        from transformers import (
            AutoTokenizer,
            Qwen3VLConfig,
            Qwen3VLForConditionalGeneration,
        )

        from rm.model import DeScore
        from rm.prompt import VIDEO_PAD, PromptTemplate, token_id

        # The patches of the vision tower follow the model, not the defaults.
        config = _config_of(self.name, "", known_models.QWEN3_VL.get(self.name))
        patch_size = config["vision_config"]["patch_size"]
        self.settings = replace(self.settings, patch_size=patch_size)
        # The folder's tokenizer, or any other with its ids of special tokens.
        folder = Path(self.name)
        if not (folder / "tokenizer.json").is_file():
            folder = shipped(_TOKENIZER)
        tokenizer = AutoTokenizer.from_pretrained(folder.as_posix())
        config["video_token_id"] = token_id(tokenizer, VIDEO_PAD)
        with torch.device("meta"):
            backbone = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
            backbone = backbone.to(self.dtype)
            return DeScore(
                backbone,
                tokenizer,
                # Its length is made up for by `_inputs`.
                PromptTemplate("{prompt}", ""),
                self.settings,
                max(tokenizer.get_vocab().values()) + 1,
                None,
            )

    def train(
        self,
        lr: LearningRates,
        lora: BackboneLora | None,
        *,
        checkpointing: bool,
    ) -> None:
        """Attach the adapter and set which parameters a stage trains."""
        with torch.device("meta"):
            self.model.param_groups(
                lr,
                lora=lora,
                weight_decay=0.0,
            )
        # The engine puts what is trained into the run's dtype, adapters too.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self.dtype)
        self.checkpointing = checkpointing
        if checkpointing:
            self.model.backbone.gradient_checkpointing_enable({"use_reentrant": False})

    def read(self, rows: int, lengths: Lengths, *, grad: bool) -> Cost:
        """Measure the rewards of ``rows`` videos, each with its chain of thought."""
        batch = self._batch(rows, lengths, cot=True)
        return self._pass(lambda: self.model(batch), grad=grad)

    def packed(
        self, rows: int, lengths: Lengths, *, cots: int, temperature: float, grad: bool
    ) -> Cost:
        """Measure stage 2's forward of ``rows`` sequences with ``cots`` chains of thought each."""
        from rm.packed import PackedCot, pack, packed_forward

        encoded, videos = self._inputs(rows, lengths)
        cot = PackedCot((_WORD,) * lengths.chain, finished=True)
        packed = pack(self.model, encoded, videos, [[cot] * cots] * rows)
        packed = packed.to(self.meter.gpu.device)

        def terms() -> Tensor:
            output = packed_forward(self.model, packed, temperature=temperature)
            return output.log_prob_BGT.sum() + output.reward_BGK.sum()

        return self._pass(terms, grad=grad)

    def write(
        self, rows: int, lengths: Lengths, *, how: Generation, copies: int = 1
    ) -> Cost:
        """Measure the writing of ``copies`` chains of thought for each of ``rows`` videos."""
        from launch.rehearsal.cots import ShortCots
        from rm.generate import generate

        self.model.eval()
        batch = self._batch(rows, lengths, cot=False)
        seeds = None if how.temperature == 0 else list(range(rows * copies))
        with ShortCots(self.meter.gpu, length=lengths.chain).used():
            return self.meter.cost(
                lambda: generate(self.model, batch, how, seeds=seeds, copies=copies)
            )

    def score(self, videos: int, lengths: Lengths, *, cots: int) -> Cost:
        """Measure a batch of the scorer: chains of thought by its settings, and the rewards."""
        if not cots:
            return self.read(videos, replace(lengths, chain=0), grad=False)
        return self.write(videos, lengths, how=self.scoring(cots), copies=cots)

    @staticmethod
    def scoring(cots: int) -> Generation:
        """Settings with which a scorer writes ``cots`` chains of thought about a video."""
        from rm.config import Generation

        temperature = 0.0 if cots == 1 else 1.0
        return Generation(temperature=temperature, repetition_penalty=_PENALTY)

    def _pass(self, output: Callable[[], Tensor], *, grad: bool) -> Cost:
        # transformers recomputes blocks in training mode alone.
        self.model.train(self.checkpointing and grad)
        return _cost_of_pass(self.meter, self.model, output, grad=grad)

    def _inputs(
        self, rows: int, lengths: Lengths
    ) -> tuple[list[Encoded], list[PreparedVideo]]:
        """Encoded prompts and videos of zeros."""
        from rm.prompt import Encoded
        from rm.video import PreparedVideo

        model = self.model
        patch_values = (
            self.settings.temporal_patch_size * 3 * self.settings.patch_size**2
        )
        frames, height, width = lengths.grid
        patches = torch.zeros(frames * height * width, patch_values)
        video = PreparedVideo(patches, lengths.grid, tuple(map(float, range(frames))))
        # The text is as long as that of the released instruction.
        ids = model.encode(PROMPT, video).prompt_ids
        missing = max(0, lengths.prefix - len(ids))
        encoded = Encoded((*ids, *[_WORD] * missing), ())
        return [encoded] * rows, [video] * rows

    def _batch(self, rows: int, lengths: Lengths, *, cot: bool) -> Batch:
        encoded, videos = self._inputs(rows, lengths)
        if cot:
            words = (_WORD,) * lengths.chain
            encoded = [replace(item, cot_ids=words) for item in encoded]
        batch = self.model.batch(encoded, videos, query=cot)
        return batch.to(self.meter.gpu.device)


def _cost_of_pass(
    meter: Meter,
    module: nn.Module,
    output: Callable[[], Tensor],
    *,
    grad: bool,
) -> Cost:
    """Measure ``output``, and with ``grad`` a backward from it."""

    def run() -> None:
        with torch.set_grad_enabled(grad):
            result = output()
            if grad:
                # Any scalar of the output has the same backward.
                result.float().square().mean().backward()

    with gradients_dropped(module):
        return meter.cost(run)


@contextmanager
def gradients_dropped(module: nn.Module) -> Iterator[None]:
    """Inside, gradients are freed as they come: `training_parts` counts where they go."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [p for p in module.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(drop) for p in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(
        *shape,
        device="meta",
        dtype=dtype,
    )


def _config_of(
    path: str,
    part: str,
    known: dict[str, Any] | None,
) -> dict[str, Any]:
    """Read the config of a component from its folder, or take the published ``known``.

    Raises ValueError where there is neither.
    """
    # A folder tells more than a published size.
    file = Path(path, part, "config.json")
    if file.is_file():
        return dict(read_json(file))
    if known is None:
        names = ", ".join([*known_models.WAN, *known_models.QWEN3_VL])
        raise ValueError(
            f"{path}: no folder with {Path(part, 'config.json')}, and none of {names}"
        )
    return dict(known)
