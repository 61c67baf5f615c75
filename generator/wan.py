"""WanGenerator: a policy over a Wan that samples, gives transition densities, and decodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from common.distributed import max_over_ranks
from common.gaussian import Gaussian
from common.lora import adapters_off
from common.memory import AdaptiveBatcher, default_device
from common.types import Group, ImagePrompt, Prompt, Step, text_of
from generator import adapter, adapter_file, attention, context_parallel, weights
from generator.adapter_file import ADAPTER_FILE
from generator.block_cache import BlockCache
from generator.conditions import (
    ImageCache,
    ImageCondition,
    check_image_prompts,
    read_image,
    stacked,
)
from generator.denoiser import Conditions, Denoiser, Expert
from generator.experts import check_sampling
from generator.family import Family
from generator.flow import Kernel, interpolate, velocity_target
from generator.flow_map import FlowMap
from generator.latents import LatentCodec
from generator.merged import MergedAdapter
from generator.offload import Waiting
from generator.pipeline import (
    compile_blocks,
    image_pipeline,
    load_pipeline,
    read_transformer,
    require_attention,
    trained_first,
    with_tokens,
)
from generator.prompts import PromptCache
from generator.sampler import (
    Members,
    Walk,
    initial_noise,
    ode,
    ode_ab2,
    rollout_group,
    velocity_calls,
)
from generator.schedule import sigma_grid, stochastic_steps, tail_grid
from generator.scoring_decoder import ScoringDecoder
from generator.wan_folder import find_wan

if TYPE_CHECKING:
    from diffusers import WanPipeline, WanTransformer3DModel
    from torch import Tensor, nn

    from generator.config import GeneratorConfig


class WanGenerator:
    """Implements `common.types.Generator` for the Wan of `generator.family`.

    module        what deepspeed wraps: the transformer in peft's wrapper, or bare without LoRA
    latent_shape  (C, F, H, W) of one video
    codec         uint8 video <-> normalised latents
    portions      how many latents go through the transformer together
    sharded       True when every rank holds a part of the weights only (ZeRO 3): then all ranks
                  must call the module equally often

    Latents, velocities and log-probs are fp32; the transformer runs in cfg.dtype. The module runs
    in eval mode while sampling and while training: both must compute the same numbers for the
    first ratio to be 1. Prefix, tail and evaluation may compute faster and less exactly, by
    ``merge_adapter``, ``attention`` and the options of the tail in cfg.sampler: only stochastic
    steps have a density.
    """

    sharded = False
    # whether the transformer takes two times
    flow_map = False

    def __init__(
        self,
        cfg: GeneratorConfig,
        pipeline: WanPipeline,
        module: nn.Module,
        device: torch.device,
        *,
        family: Family | None = None,
        frozen: Expert | None = None,
    ) -> None:
        """Make a generator of parts that are loaded.

        pipeline  may lack VAE and text encoder; then nothing can be decoded or sampled
        module    what is trained, with its adapter
        family    None is a Wan with a single transformer
        frozen    the other one of two transformers; without it only the trained one's noise
                  levels have a velocity
        """
        self.cfg = cfg
        self.kernel = Kernel(
            cfg.sampler.kernel, cfg.sampler.noise_level, cfg.sampler.max_std
        )
        self.module = module
        self.device = device
        self.family = family or Family()
        if self.family.text_length not in (None, cfg.max_sequence_length):
            raise ValueError(
                f"generator.max_sequence_length={cfg.max_sequence_length} must be "
                f"{self.family.text_length}: with tokens of an image the transformer cuts off so "
                "many as the text"
            )
        transformer = module if cfg.lora is None else module.get_base_model()
        self._policy = denoiser_of(
            cfg, self.family, Expert(module, transformer), frozen, device
        )
        self.latent_shape: tuple[int, ...] = ()
        # What decodes for rewards in training, where it is not the VAE.
        self.scoring_decoder: ScoringDecoder | None = None
        # Without a VAE no video size is known: it is for training on stored latents.
        if pipeline.vae is not None:
            self.codec = LatentCodec(pipeline.vae, batch=cfg.decode_batch)
            patch = transformer.config.patch_size
            self.latent_shape = self.codec.latent_shape(
                height=cfg.height,
                width=cfg.width,
                num_frames=cfg.num_frames,
                patch=patch,
            )
            context_parallel.check_tokens(
                self.latent_shape, patch, cfg.context_parallel
            )
        # Latents go through the transformer a few together.
        self.portions = AdaptiveBatcher(
            cfg.rollout_batch, what="latents in the transformer"
        )
        self.prompts = PromptCache(pipeline, max_length=cfg.max_sequence_length)
        # Only a model that takes images can be asked for one; without a VAE they are given.
        self.images: ImageCache | None = None
        if self.family.image != "none":
            codec = None if pipeline.vae is None else self.codec
            self.images = ImageCache(pipeline, self.family, codec, cfg, device)
        self._pipeline = pipeline
        # Copies of the targets' weights for sampling, made when a rollout begins.
        self._merged: MergedAdapter | None = None
        if cfg.lora is not None and cfg.sampler.merge_adapter:
            self._merged = MergedAdapter(module)
        # The reference of full fine-tuning is read when it is first needed.
        self._in_reference = False
        self._frozen: Denoiser | None = None

    @classmethod
    def load(
        cls,
        cfg: GeneratorConfig,
        *,
        device: torch.device | str | None = None,
        seed: int = 0,
        transformer_only: bool = False,
    ) -> WanGenerator:
        """Read a WanPipeline folder, freeze what is not trained, and attach the adapter.

        device  where everything lives; by default the current CUDA device if there is one
        seed    of the adapter's initial weights, the same on all ranks
        transformer_only  leaves VAE and text encoder out, to train on stored latents and
                          embeddings (`flow_error`)

        Raises FileNotFoundError when cfg.path is no WanPipeline folder, ValueError when it is
        another kind of Wan, its weights are not complete and finite, the video size does not fit
        the VAE, a LoRA target matches nothing, an attention backend cannot run here, or ranks
        cannot share the tokens of a sample.
        """
        # 1. The stock pipeline, frozen, on its device.
        folder = find_wan(cfg.path)
        family = Family.of(folder)
        if family.flow_map != cls.flow_map:
            raise ValueError(
                f"{folder} is {'' if family.flow_map else 'not '}a flow map (AnyFlow): load it by "
                "generator.anyflow.load_generator, which knows both"
            )
        check_sampling(cfg, family)
        device = torch.device(device or default_device())
        require_attention(cfg, device)
        pipeline = load_pipeline(
            cfg, folder, family, device=device, transformer_only=transformer_only
        )

        # 2. What is trained: an adapter, or every weight of the transformer.
        name, *others = trained_first(cfg, family)
        transformer = getattr(pipeline, name)
        idle = [getattr(pipeline, other) for other in others]
        all_loaded = [transformer, *(model for model in idle if model is not None)]
        for model in all_loaded:
            attention.set_backend(model, cfg.attention)
        if cfg.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if cfg.lora is None:
            module = weights.of_one_dtype(transformer, cfg.dtype)
            module.requires_grad_(requires_grad=True)
        else:
            module = adapter.attach(transformer, cfg.lora, seed=seed)

        # 3. Ranks that share the tokens of a sample; before blocks are compiled.
        parallel = context_parallel.join_ranks(cfg.context_parallel, device)
        for model in all_loaded:
            context_parallel.share_tokens(model, parallel)
        for backend in (cfg.sampler.attention, cfg.sampler.tail_attention):
            if backend is not None and parallel is not None:
                with attention.backend(transformer, backend):
                    context_parallel.check_backend(transformer)
        if cfg.compile:
            for model in all_loaded:
                compile_blocks(model)
        if cfg.tf32:
            # For the whole process: rewards compute with it too.
            torch.backends.cuda.matmul.allow_tf32 = True

        # 4. The transformer of two that is not trained.
        frozen = None
        for model in all_loaded[1:]:
            waiting = Waiting(model, device) if cfg.experts.offload else None
            frozen = Expert(model, model, waiting)
        generator = cls(
            cfg, pipeline, module.eval(), device, family=family, frozen=frozen
        )

        # 5. The small decoder, whose sizes are compared with the VAE's.
        if cfg.scoring_decoder is not None and not transformer_only:
            small = ScoringDecoder.load(cfg, generator.codec, device)
            generator.scoring_decoder = small
        return generator

    # ---- sampling, without gradient ----

    @torch.no_grad()
    def rollout(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        seeds: Sequence[int],
        iteration: int = 0,
        first_member: int = 0,
    ) -> list[Group]:
        """Sample one Group per prompt; see `generator.sampler.rollout_group`.

        A group depends on its prompt and seed, and on ``iteration`` where a window of stochastic
        steps moves. Member ``first_member`` + i is the same in a group of any size.

        A group costs c [(k + 1) + G (T - k - 1)] DiT sample-forwards, with c = 2 under guidance
        and else 1. The number of calls differs with k where G is more than ``rollout_batch``; when
        sharded, every rank fills up to the largest number of calls.
        """
        self._require_vae()
        check_image_prompts(prompts, self.family, self.cfg.path)
        # 1. Compare the number of calls with other ranks'.
        self.portions.fixed = self.calls_together
        missing_calls = 0
        if self.sharded:
            # compared before sampling, while all ranks are at the same place
            missing_calls = self._missing_calls(group_size, seeds, iteration)

        # 2. Sample group after group; the adapter is the same for all of them.
        groups = []
        with self._held_copies(), self.denoiser.kept():
            for prompt, seed in zip(prompts, seeds, strict=True):
                group = rollout_group(
                    self._guided_velocity(prompt),
                    Members(prompt, seed, group_size, first_member),
                    self._walk(prompt, seed, iteration),
                    batch=self.portions,
                    device=self.device,
                )
                clean_GCFHW = self._with_first_frame([prompt], group.clean_GCFHW)
                groups.append(replace(group, clean_GCFHW=clean_GCFHW))

        # calls that only keep the ranks in step, on the smallest latent there is
        for _ in range(missing_calls):
            shape = (self.latent_shape[0], *self.patch_size)
            if isinstance(prompts[0], ImagePrompt):
                # as large as the image's
                shape = self._walk_shape(prompts[0])
            x_1CFHW = torch.zeros(1, *shape)
            self.velocity(x_1CFHW, torch.ones(1), prompts[:1], guidance_scale=1.0)
        return groups

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        num_steps: int | None = None,
        scheduler: Literal["euler", "pipeline"] = "euler",
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Sample without noise on the way, for evaluation: clean latents (B, C, F, H, W) fp32.

        The initial noise of a seed is that of `rollout`. "euler" walks the training grid;
        "pipeline" is the stock WanPipeline with the scheduler of its folder (UniPC for the
        published Wan 2.1). ``guidance_scale`` replaces the sampler's, along the training grid.

        Raises ValueError for another guidance in the stock pipeline or with a flow map.
        """
        self._require_vae()
        if len(prompts) != len(seeds):
            raise ValueError(
                f"sample got {len(prompts)} prompts and {len(seeds)} seeds"
            )
        if scheduler not in ("euler", "pipeline"):
            raise ValueError(
                f"scheduler must be 'euler' or 'pipeline', got {scheduler!r}"
            )
        if guidance_scale is not None and (scheduler == "pipeline" or self.flow_map):
            raise ValueError(
                f"guidance_scale={guidance_scale} is for the training grid of a velocity: the "
                "stock pipeline takes the sampler's, and a flow map has its own in its weights"
            )
        check_image_prompts(prompts, self.family, self.cfg.path)
        # Latents of texts and of images have different shapes on the way.
        if len({self._walk_shape(prompt) for prompt in prompts}) > 1:
            alone = [
                self.sample(
                    [prompt],
                    [seed],
                    num_steps=num_steps,
                    scheduler=scheduler,
                    guidance_scale=guidance_scale,
                )
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
            return torch.cat(alone)
        # Grid and noise are those of a rollout.
        cfg = self.cfg.sampler
        steps = num_steps or cfg.sample_steps or cfg.num_steps
        sigmas = sigma_grid(steps, shift=cfg.shift).tolist()

        def sample_rows(row_B: Tensor) -> Tensor:
            rows = row_B.tolist()
            texts = [prompts[row] for row in rows]
            noises = [
                initial_noise(seeds[row], self._walk_shape(prompts[row]))
                for row in rows
            ]
            x_BCFHW = torch.stack(noises).to(self.device)
            if scheduler == "pipeline":
                return self._stock(x_BCFHW, texts, steps)
            if guidance_scale is None:
                x_BCFHW = self._descend(x_BCFHW, sigmas, texts)
            else:
                guided = self._guided_velocity(*texts, scale=guidance_scale)
                x_BCFHW = ode(guided, x_BCFHW, sigmas)
            return self._with_first_frame(texts, x_BCFHW)

        # In batches, as many videos as fit.
        self.portions.fixed = self.calls_together
        with self._held_copies(), self.denoiser.kept(), self._fast(cfg.attention):
            return self.portions.over(sample_rows, torch.arange(len(prompts)))

    def decode(self, clean_BCFHW: Tensor) -> Tensor:
        """Decode to uint8 video (B, T, Y, X, 3) on the CPU.

        With an fp32 VAE it is WanPipeline's byte for byte.
        """
        return self.codec.decode(clean_BCFHW.to(self.device))

    def decode_to_score(self, clean_BCFHW: Tensor) -> Tensor:
        """What rewards see in training: `decode`, or the small decoder in its place.

        The shapes and values are those of `decode`: uint8 (B, T, Y, X, 3) on the CPU.
        """
        if self.scoring_decoder is None:
            return self.decode(clean_BCFHW)
        return self.scoring_decoder.decode(clean_BCFHW.to(self.device))

    def encode(self, video_BTYXC: Tensor) -> Tensor:
        """Encode uint8 video to normalised latents (B, C, F, H, W) fp32, the posterior mean."""
        return self.codec.encode(video_BTYXC, device=self.device)

    # ---- likelihood and error, with gradient ----

    def transition(self, prompt: Prompt, step: Step) -> Gaussian:
        """Distribution of `next` given the latent: mean (M, C, F, H, W), gradient through it.

        A latent that all members share costs c' DiT sample-forwards, separate latents cost c' G;
        c' = c, or 1 when guidance_in_update is off.
        """
        # Without guidance an update costs half as much.
        scale = self.guidance_at(step.sigma) if self.cfg.guidance_in_update else 1.0
        # All members are at the same noise level and have the same prompt.
        x_MCFHW = step.latent_MCFHW.to(self.device)
        sigma_M = torch.full((len(x_MCFHW),), step.sigma)
        texts = [prompt] * len(x_MCFHW)
        v_MCFHW = self.velocity(x_MCFHW, sigma_M, texts, guidance_scale=scale)
        return self.kernel.transition(x_MCFHW, v_MCFHW, step.sigma, step.sigma_next)

    def flow_error(
        self,
        clean_BCFHW: Tensor,
        noise_BCFHW: Tensor,
        sigma_B: Tensor,
        prompts: Sequence[Prompt],
    ) -> Tensor:
        """Squared velocity error, MEAN over latent elements -> (B,) fp32, with gradient.

            |v_theta(x_sigma) - (eps - x_0)|^2                    without guidance

        It is the term of Flow-DPO (2501.13918, equation 6), which takes the sum: with the mean,
        beta does not depend on the size of the video. A first frame that an image gives has no
        noise and no error: the mean is over the others.
        """
        clean_BCFHW = clean_BCFHW.to(self.device)
        noise_BCFHW = noise_BCFHW.to(self.device)
        # Compare the predicted velocity with the true one.
        v_BCFHW = self.flow_velocity(
            clean_BCFHW, noise_BCFHW, sigma_B, prompts, guided=False
        )
        target_BCFHW = velocity_target(clean_BCFHW, noise_BCFHW)
        error_BCFHW = v_BCFHW - self._free_frames(target_BCFHW, prompts)
        return error_BCFHW.square().flatten(1).mean(dim=1)

    def flow_velocity(
        self,
        clean_BCFHW: Tensor,
        noise_BCFHW: Tensor,
        sigma_B: Tensor,
        prompts: Sequence[Prompt],
        *,
        guided: bool = True,
    ) -> Tensor:
        """Velocity of noised latents -> (B, C, F, H, W) fp32, with gradient.

        v_theta((1 - sigma) x_0 + sigma eps), with the guidance of the rollout if ``guided``. A
        first frame that an image gives is left out.
        """
        x_BCFHW = interpolate(
            clean_BCFHW.to(self.device), noise_BCFHW.to(self.device), sigma_B
        )
        x_BCFHW = self._free_frames(x_BCFHW, prompts)
        scale = self.cfg.sampler.guidance_scale if guided else 1.0
        return self.velocity(x_BCFHW, sigma_B, prompts, guidance_scale=scale)

    def velocity(
        self,
        x_BCFHW: Tensor,
        sigma_B: Tensor,
        prompts: Sequence[Prompt],
        *,
        guidance_scale: float,
    ) -> Tensor:
        """v at (x, sigma), one prompt per sample -> (B, C, F, H, W), fp32 (fp64 for fp64 weights).

        A scale of 1 is one forward of B samples; otherwise the conditional and the unconditional
        branch go through the module as one batch of 2 B. Raises RuntimeError under `reference`,
        or with a merged adapter, with gradients enabled.
        """
        # 1. Checks.
        self._require_no_grad()
        texts = list(prompts)
        if not len(x_BCFHW) == len(sigma_B) == len(texts):
            raise ValueError(
                f"velocity got {len(x_BCFHW)} latents, {len(sigma_B)} sigmas, {len(texts)} prompts"
            )

        # 2. Embeddings of the prompts, and under guidance of the negative prompt.
        conditions = self._conditions(texts, guided=guidance_scale != 1)
        return self.denoiser.velocity(
            x_BCFHW, sigma_B, conditions, guidance_scale=guidance_scale
        )

    def _require_no_grad(self) -> None:
        """Raise RuntimeError with gradients enabled, where none can be right."""
        merged = self._merged is not None and self._merged.in_use
        if merged and torch.is_grad_enabled():
            raise RuntimeError(
                "a merged adapter gets no gradient: sample under torch.no_grad()"
            )
        if self._in_reference and torch.is_grad_enabled():
            raise RuntimeError(
                "the reference runs under torch.no_grad() only: gradient checkpointing recomputes "
                "after `reference` has closed, with the adapter on again"
            )

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the generator is the base model: adapter off, or without LoRA a frozen copy.

        Use it under torch.no_grad() only, see `velocity`. The copy is read from cfg.path at the
        first use, so it is the base model whatever has been trained or resumed since, and a run
        without KL does not pay for it. May be nested.
        """
        # A nested block changes nothing.
        if self._in_reference:
            yield
            return
        self._in_reference = True
        try:
            # An adapter is switched off; without one a frozen copy is used, see `denoiser`.
            if self.cfg.lora is not None:
                with ExitStack() as stack:
                    for expert in self._policy.loaded:
                        # the frozen one of two transformers may have none
                        if expert.module is not expert.transformer:
                            stack.enter_context(adapters_off(expert.module))
                    yield
            else:
                if self._frozen is None:
                    self._frozen = self._load_frozen()
                yield
        finally:
            self._in_reference = False

    # ---- prompts and weights ----

    def encode_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Put the embeddings of these prompts and of the negative prompt into the cache."""
        texts = [text_of(prompt) for prompt in prompts]
        self.prompts.encode([*texts, self.cfg.sampler.negative_prompt])
        for prompt in prompts:
            if isinstance(prompt, ImagePrompt):
                self.images.get(prompt.image)

    @contextmanager
    def given_prompts(
        self,
        embedding_LD: Mapping[str, Tensor],
        images: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Iterator[None]:
        """Use precomputed embeddings inside the block, see `PromptCache.given`.

        images  {file: the tensors of its `ImageCondition`}, for models that take images
        """
        conditions = {}
        for path, tensors in (images or {}).items():
            conditions[path] = ImageCondition.of(tensors)
        with ExitStack() as stack:
            stack.enter_context(self.prompts.given(embedding_LD))
            if conditions:
                stack.enter_context(self.images.given(conditions))
            yield

    def free_text_encoder(self) -> None:
        """Free the encoders of texts and images; prompts that are new then raise RuntimeError."""
        self.encode_prompts([])
        self.prompts.free_text_encoder()
        if self.images is not None:
            self.images.free_encoder()

    def save_trained(
        self, folder: Path | str, state_dict: Mapping[str, Tensor] | None = None
    ) -> Path:
        """Write the trained weights and return their file; one rank calls it.

        That is an adapter for stock `WanPipeline.load_lora_weights(folder)`; without LoRA it is the
        complete transformer, as folder/transformer in diffusers' layout. ``state_dict`` replaces
        the state of the module (gathered from its shards).
        """
        if self.cfg.lora is None:
            return weights.save(self.module, Path(folder), state_dict)
        folders = self._adapter_folders(Path(folder))
        for place, expert in enumerate(self._policy.experts):
            # an adapter that was loaded belongs to the model that was sampled from
            frozen = place != self._policy.trained and expert is not None
            if frozen and expert.module is not expert.transformer:
                adapter.save(expert.module, folders[place])
        return adapter.save(self.module, folders[self._policy.trained], state_dict)

    def load_trained(self, folder: Path | str) -> None:
        """Read what `save_trained` wrote, before an engine is built.

        A complete transformer also replaces the base under an adapter. Of two transformers each
        may have an adapter; that of the frozen one stays as it is. Raises ValueError when it
        does not fit, or is an adapter and GeneratorConfig.lora is null; FileNotFoundError when the
        folder holds neither.
        """
        folder = Path(folder)
        # The folder's files decide what is loaded.
        places = [
            place
            for place, part in enumerate(self._adapter_folders(folder))
            if (part / ADAPTER_FILE).is_file()
        ]
        if weights.is_whole(folder) and places:
            raise ValueError(
                f"{folder} holds both a transformer and {ADAPTER_FILE}: keep the wanted one only"
            )
        if weights.is_whole(folder):
            weights.load(self.transformer, folder)
        elif self.cfg.lora is None:
            raise ValueError(
                f"GeneratorConfig.lora is null and {folder} holds no transformer folder"
            )
        elif not places:
            raise FileNotFoundError(
                f"{folder} holds no {ADAPTER_FILE}; a run leaves its adapter in RUN/final"
            )
        for place in places:
            stored = adapter_file.read(self._adapter_folders(folder)[place])
            if place == self._policy.trained:
                adapter.load(self.module, stored)
            else:
                expert = self._policy.at(place)
                module = adapter.attach_stored(
                    expert.transformer, stored, device=self.device
                )
                self._policy.experts[place] = replace(expert, module=module)

    def _adapter_folders(self, folder: Path) -> list[Path]:
        """Where the adapter of each transformer is: the folder, and one inside it."""
        return [folder, *(folder / name for name in self.family.experts[1:])]

    # ---- parts of a rollout ----

    def _gives_first_frame(self, prompt: Prompt) -> bool:
        """Whether the video's first latent frame is that of the prompt's image."""
        is_image = isinstance(prompt, ImagePrompt)
        return is_image and self.family.image == "first_frame"

    def _walk_shape(self, prompt: Prompt) -> tuple[int, ...]:
        """(C, F, H, W) of what a walk moves: without the first frame where an image gives it."""
        channels, frames, height, width = self.latent_shape
        if self._gives_first_frame(prompt):
            frames -= 1
        return channels, frames, height, width

    def _free_frames(self, x_BCFHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Leave out the first frame where an image gives it."""
        if self._gives_first_frame(prompts[0]):
            return x_BCFHW[:, :, 1:]
        return x_BCFHW

    def _with_first_frame(self, prompts: Sequence[Prompt], x_BCFHW: Tensor) -> Tensor:
        """Put the given first frames in front; a single prompt serves every sample."""
        if not self._gives_first_frame(prompts[0]):
            return x_BCFHW
        rows = prompts if len(prompts) > 1 else [*prompts] * len(x_BCFHW)
        images = [self.images.get(prompt.image) for prompt in rows]
        first_BCFHW, _ = stacked(images, x_BCFHW.device, x_BCFHW.dtype)
        return torch.cat([first_BCFHW, x_BCFHW], dim=2)

    def _walk(
        self,
        prompt: Prompt,
        seed: int,
        iteration: int,
    ) -> Walk:
        """Grid, stochastic steps, kernel and tail of one group."""
        cfg = self.cfg.sampler
        return Walk(
            shape=self._walk_shape(prompt),
            sigmas=sigma_grid(cfg.num_steps, shift=cfg.shift).tolist(),
            steps=stochastic_steps(seed, cfg, iteration=iteration),
            kernel=self.kernel,
            shared_noise=cfg.initial_noise == "shared",
            tail=lambda x_BCFHW, sigmas: self._tail(x_BCFHW, sigmas, prompt),
            prefix=lambda x_BCFHW, sigmas: self._prefix(x_BCFHW, sigmas, prompt),
        )

    def _guided_velocity(
        self, *prompts: Prompt, scale: float | None = None
    ) -> Callable[[Tensor, float], Tensor]:
        """The velocity as a function of (x, sigma); a single prompt serves every sample."""

        def velocity(x_BCFHW: Tensor, sigma: float) -> Tensor:
            guidance = self.guidance_at(sigma) if scale is None else scale
            texts = prompts if len(prompts) > 1 else prompts * len(x_BCFHW)
            sigma_B = torch.full((len(x_BCFHW),), sigma)
            return self.velocity(x_BCFHW, sigma_B, texts, guidance_scale=guidance)

        return velocity

    def _held_copies(self) -> AbstractContextManager[None]:
        """Inside, the merged adapter of now is ready for `_fast`; the reference has none."""
        if self._merged is None or self._in_reference:
            return nullcontext()
        return self._merged.held()

    @contextmanager
    def _fast(self, backend: str | None) -> Iterator[None]:
        """Inside, the policy computes with its merged adapter and with an attention backend."""
        with ExitStack() as stack:
            for expert in self.denoiser.loaded:
                stack.enter_context(attention.backend(expert.transformer, backend))
            if self._merged is not None:
                stack.enter_context(self._merged.applied())
            yield

    def _prefix(
        self,
        x_BCFHW: Tensor,
        sigmas: Sequence[float],
        prompt: Prompt,
    ) -> Tensor:
        """Walk to the first stochastic step."""
        with self._fast(self.cfg.sampler.attention):
            return self._descend(x_BCFHW, sigmas, [prompt])

    def _descend(
        self,
        x_BCFHW: Tensor,
        sigmas: Sequence[float],
        prompts: Sequence[Prompt],
    ) -> Tensor:
        """Walk along sigmas without noise; a single prompt serves every sample."""
        return ode(self._guided_velocity(*prompts), x_BCFHW, sigmas)

    def _tail(
        self,
        x_BCFHW: Tensor,
        sigmas: Sequence[float],
        prompt: Prompt,
    ) -> Tensor:
        """Walk to sigma = 0 with the sampler's tail options: grid, solver, guidance, cache."""
        cfg = self.cfg.sampler
        sigmas = self._tail_sigmas(sigmas)
        # Solver and guidance.
        solver = ode_ab2 if cfg.tail_solver == "ab2" else ode
        guided = self._guided_velocity(prompt, scale=cfg.tail_guidance)
        with self._fast(cfg.tail_attention or cfg.attention):
            # Another expert's velocity is another function: its part begins anew.
            for part in self.denoiser.parts(sigmas):
                velocity = guided
                if cfg.tail_cache > 1:
                    # every tail_cache-th call runs all blocks of the transformer
                    place = self.denoiser.place_at(part[0])
                    cache = BlockCache(self.denoiser.at(place).transformer)
                    velocity = cache.wrap(guided, every=cfg.tail_cache)
                x_BCFHW = solver(velocity, x_BCFHW, part)
        return x_BCFHW

    def _tail_sigmas(self, sigmas: Sequence[float]) -> Sequence[float]:
        """The tail's own grid, where it has fewer steps than the training grid has left."""
        cfg = self.cfg.sampler
        if cfg.tail_steps is None or cfg.tail_steps >= len(sigmas) - 1:
            return sigmas
        return tail_grid(sigmas[0], cfg.tail_steps, shift=cfg.shift).tolist()

    def _missing_calls(
        self,
        group_size: int,
        seeds: Sequence[int],
        iteration: int,
    ) -> int:
        """How many velocity calls a rollout has fewer here than on the rank with most calls."""
        cfg = self.cfg.sampler
        # Which steps are stochastic depends on the seeds, which differ between ranks.
        calls = 0
        for seed in seeds:
            calls += velocity_calls(
                stochastic_steps(seed, cfg, iteration=iteration),
                cfg.num_steps,
                group_size,
                self.portions.size or group_size,
                shared_noise=cfg.initial_noise == "shared",
                tail_steps=cfg.tail_steps,
                prefix_steps=cfg.prefix_steps,
            )
        return int(max_over_ranks(calls)) - calls

    def _stock(
        self,
        x_BCFHW: Tensor,
        prompts: Sequence[Prompt],
        num_steps: int,
    ) -> Tensor:
        """Sample with the stock pipeline's loop and scheduler."""
        # The pipeline gets the policy, or the reference.
        for name, expert in zip(
            self.family.experts, self.denoiser.experts, strict=True
        ):
            setattr(self._pipeline, name, expert.transformer)
            if expert.waiting is not None:
                expert.waiting.fetch()
        options: dict[str, Any] = {}
        if self.family.boundary is not None:
            options["guidance_scale_2"] = self.cfg.sampler.guidance_scale_2
        # It takes a single image.
        if isinstance(prompts[0], ImagePrompt):
            rows = [
                self._stock_call([prompt], x_BCFHW[i : i + 1], num_steps, options)
                for i, prompt in enumerate(prompts)
            ]
            return torch.cat(rows)
        return self._stock_call(prompts, x_BCFHW, num_steps, options)

    def _stock_call(
        self,
        prompts: Sequence[Prompt],
        x_BCFHW: Tensor,
        num_steps: int,
        options: Mapping[str, Any],
    ) -> Tensor:
        # Embeddings come from the cache: the text encoder may have been freed.
        conditions = self._conditions(prompts, guided=True)
        options = dict(options)
        pipeline = self._pipeline
        if isinstance(prompts[0], ImagePrompt):
            options["image"] = read_image(prompts[0].image)
            if conditions.tokens_BLD is not None:
                # the pipeline takes the tokens or the image: its encoder gives ours
                pipeline = with_tokens(pipeline, conditions.tokens_BLD)
            if self.family.image == "first_frame":
                pipeline = image_pipeline(pipeline)
                # the frame that the image gives is overwritten before it is read
                x_BCFHW = torch.cat([x_BCFHW[:, :, :1], x_BCFHW], dim=2)
        return pipeline(
            prompt_embeds=conditions.text_BLD,
            negative_prompt_embeds=conditions.negative_BLD,
            height=self.cfg.height,
            width=self.cfg.width,
            num_frames=self.cfg.num_frames,
            num_inference_steps=num_steps,
            guidance_scale=self.cfg.sampler.guidance_scale,
            latents=x_BCFHW,
            output_type="latent",
            **options,
        ).frames.float()

    def _require_vae(self) -> None:
        if self._pipeline.vae is None:
            raise RuntimeError(
                "this generator was loaded without its VAE, to train on stored latents; "
                "it cannot sample"
            )

    def _conditions(self, prompts: Sequence[Prompt], *, guided: bool) -> Conditions:
        """What these prompts tell the transformer and, if guided, as many negative prompts."""
        texts = [text_of(prompt) for prompt in prompts]
        negative = [self.cfg.sampler.negative_prompt] * len(texts) if guided else []
        # Encoded together, so that both are there before a forward.
        self.prompts.encode([*texts, *negative])
        dtype = self.denoiser.expert.dtype
        text_BLD = self.prompts.get(texts, device=self.device, dtype=dtype)
        negative_BLD = None
        if guided:
            negative_BLD = self.prompts.get(negative, device=self.device, dtype=dtype)

        # The images of all prompts, or of none.
        paths = [prompt.image for prompt in prompts if isinstance(prompt, ImagePrompt)]
        if not paths:
            return Conditions(text_BLD, negative_BLD)
        images = [self.images.get(path) for path in paths]
        image_BCFHW, tokens_BLD = stacked(images, self.device, dtype)
        return Conditions(text_BLD, negative_BLD, image_BCFHW, tokens_BLD)

    # ---- the module in use ----

    @property
    def calls_together(self) -> bool:
        """True when a rank may not call the module more often than others, after lack of memory."""
        return self.sharded or self.cfg.context_parallel > 1

    @property
    def modules(self) -> list[nn.Module]:
        """What is called: the trained module, and the other one of two transformers."""
        return [expert.module for expert in self._policy.loaded]

    def trains_at(self, sigma: float) -> bool:
        """Whether the velocity at a noise level is that of the transformer that is trained."""
        return self._policy.place_at(sigma) == self._policy.trained

    def guidance_at(self, sigma: float) -> float:
        """Guidance scale at a noise level: that of its transformer."""
        cfg = self.cfg.sampler
        if cfg.guidance_scale_2 is not None and self.denoiser.place_at(sigma) == 1:
            return cfg.guidance_scale_2
        return cfg.guidance_scale

    def context_gap(self) -> float:
        """Compare the gradient of ranks that share tokens with one rank's; all must call it."""
        expert = self.denoiser.expert
        return context_parallel.gradient_gap(expert.module, expert.transformer)

    @property
    def denoiser(self) -> Denoiser:
        """The policy, or inside `reference` the reference."""
        # with an adapter they are one module
        if self._in_reference and self._frozen is not None:
            return self._frozen
        return self._policy

    @property
    def transformer(self) -> WanTransformer3DModel:
        """The stock module that is trained, or of the reference, without the adapter's wrapper."""
        return self.denoiser.expert.transformer

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Latent frames, rows and columns of a token."""
        return self.transformer.config.patch_size

    def _load_frozen(self) -> Denoiser:
        """Read the base model once more, as the reference of a full fine-tuning."""
        # Read again, since the module in use may have been trained or resumed.
        folder = find_wan(self.cfg.path) / "transformer"
        model = read_transformer(self.cfg, self.family, folder, device=self.device)
        model = weights.of_one_dtype(model, self.cfg.dtype)
        attention.set_backend(model, self.cfg.attention)
        context_parallel.share_tokens(model, self.module._parallel_config)
        model.requires_grad_(requires_grad=False).eval()
        return type(self._policy)([Expert(model, model)], self.device)


def denoiser_of(
    cfg: GeneratorConfig,
    family: Family,
    trained: Expert,
    frozen: Expert | None,
    device: torch.device,
) -> Denoiser:
    """The policy's denoiser, with its experts in the order of their noise levels."""
    place = family.experts.index(trained_first(cfg, family)[0])
    experts = [trained, frozen] if place == 0 else [frozen, trained]
    kind = FlowMap if family.flow_map else Denoiser
    return kind(
        experts[: len(family.experts)],
        device,
        boundary=family.boundary,
        trained=place,
        first_frame=family.image == "first_frame",
    )
