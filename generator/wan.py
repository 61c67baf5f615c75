"""WanGenerator: a stock WanPipeline folder as a policy that samples, says how likely a sample was, and decodes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

from common.distributed import max_over_ranks
from common.gaussian import Gaussian
from common.lora import switched_off
from common.memory import AdaptiveBatcher
from common.types import Group, Step
from generator import adapter, weights
from generator.block_cache import BlockCache
from generator.flow import Kernel, guide, interpolate, velocity_target, widen
from generator.latents import LatentCodec
from generator.prompts import PromptCache
from generator.sampler import initial_noise, ode, ode_ab2, rollout_group, velocity_calls
from generator.schedule import sigma_grid, stochastic_steps, tail_grid

if TYPE_CHECKING:
    from torch import Tensor, nn

    from generator.config import GeneratorConfig


class WanGenerator:
    """Implements `common.types.Generator` for Wan 2.1 text-to-video.

    module        what deepspeed wraps: the transformer under peft's wrapper, or the bare transformer without LoRA
    latent_shape  (C, F, H, W) of one video
    codec         uint8 video <-> normalised latents
    sharded       every rank holds a piece of the weights only (ZeRO 3): all must call the module equally often

    Latents, velocities and log-probs are fp32; the transformer runs in cfg.dtype. The module always runs in eval mode,
    while sampling and while training: both must compute the same numbers for the first ratio to be 1.
    """

    sharded = False

    def __init__(
        self,
        cfg: GeneratorConfig,
        pipeline: WanPipeline,
        module: nn.Module,
        device: torch.device,
    ) -> None:
        """``pipeline`` may lack VAE and text encoder: then nothing is decoded or sampled, see `load`."""
        self.cfg = cfg
        self.kernel = Kernel(
            cfg.sampler.kernel, cfg.sampler.noise_level, cfg.sampler.max_std
        )
        self.module = module
        self.device = device
        self.latent_shape: tuple[int, ...] = ()
        if pipeline.vae is not None:
            self.codec = LatentCodec(pipeline.vae, batch=cfg.decode_batch)
            self.latent_shape = self.codec.latent_shape(
                height=cfg.height,
                width=cfg.width,
                num_frames=cfg.num_frames,
                patch=pipeline.transformer.config.patch_size,
            )
        self.portions = AdaptiveBatcher(
            cfg.rollout_batch, what="latents in the transformer"
        )
        self.prompts = PromptCache(pipeline, max_length=cfg.max_sequence_length)
        self._pipeline = pipeline
        self._in_reference = False
        self._frozen: WanTransformer3DModel | None = None

    @classmethod
    def load(
        cls,
        cfg: GeneratorConfig,
        *,
        device: torch.device | str | None = None,
        seed: int = 0,
        transformer_only: bool = False,
    ) -> WanGenerator:
        """Read the folder with stock `from_pretrained`, freeze what is not trained, attach the adapter.

        device  where everything lives; by default the current CUDA device if there is one
        seed    of the adapter's initial weights, the same on all ranks
        transformer_only  without VAE and text encoder, to train on latents and embeddings made before (`flow_error`)
        Raises FileNotFoundError when cfg.path is no WanPipeline folder, ValueError when the video size does not fit the
        VAE or a LoRA target matches nothing.
        """
        weights.require_folder(cfg.path)
        if device is None:
            device = (
                torch.device("cuda", torch.cuda.current_device())
                if torch.cuda.is_available()
                else "cpu"
            )
        device = torch.device(device)
        if transformer_only:
            parts = {"vae": None, "text_encoder": None, "tokenizer": None}
        else:
            parts = {
                "vae": AutoencoderKLWan.from_pretrained(
                    cfg.path, subfolder="vae", dtype=torch.float32
                )
            }
        pipeline = WanPipeline.from_pretrained(
            cfg.path, **parts, dtype=getattr(torch, cfg.dtype)
        )
        pipeline.set_progress_bar_config(disable=True)
        for frozen in (pipeline.vae, pipeline.text_encoder):
            if frozen is not None:
                frozen.requires_grad_(requires_grad=False).eval()
        pipeline.to(device)
        transformer = pipeline.transformer
        if cfg.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if cfg.lora is None:
            module = weights.of_one_dtype(transformer, cfg.dtype).requires_grad_(
                requires_grad=True
            )
        else:
            module = adapter.attach(transformer, cfg.lora, seed=seed)
        if cfg.compile:
            transformer.compile_repeated_blocks()
        return cls(cfg, pipeline, module.eval(), device)

    # ---- sampling -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(
        self,
        prompts: Sequence[str],
        *,
        group_size: int,
        seeds: Sequence[int],
        iteration: int = 0,
        first_member: int = 0,
    ) -> list[Group]:
        """One Group per prompt; see `generator.sampler.rollout_group`. A group depends on its prompt and seed alone,
        and where a window moves, on ``iteration``. Member ``first_member`` + i is the same in a group of any size.

        DiT sample-forwards per group: c [(k + 1) + G (T - k - 1)], c = 2 under guidance and else 1. The calls differ
        with k where G is more than ``rollout_batch``; when sharded, all ranks go on to the same number of them.
        """
        cfg = self.cfg.sampler
        sigmas = sigma_grid(cfg.num_steps, shift=cfg.shift).tolist()
        self._require_vae()
        self.portions.fixed = self.sharded
        idle = self._idle_calls(group_size, seeds, iteration) if self.sharded else 0

        def one(prompt: str, seed: int) -> Group:
            steps = stochastic_steps(seed, cfg, iteration=iteration)
            return rollout_group(
                lambda x_BCFHW, sigma: self._guided(
                    x_BCFHW, sigma, [prompt] * len(x_BCFHW)
                ),
                prompt,
                seed=seed,
                group_size=group_size,
                shape=self.latent_shape,
                sigmas=sigmas,
                steps=steps,
                kernel=self.kernel,
                shared_noise=cfg.initial_noise == "shared",
                tail=lambda x_BCFHW, left: self._tail(x_BCFHW, left, prompt),
                first_member=first_member,
                batch=self.portions,
                device=self.device,
            )

        groups = [
            one(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        for _ in range(idle):  # on the smallest latent there is, for nothing
            x_1CFHW = torch.zeros(
                1, self.latent_shape[0], *self._active()[1].config.patch_size
            )
            self.velocity(x_1CFHW, torch.ones(1), prompts[:1], guidance_scale=1.0)
        return groups

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        num_steps: int | None = None,
        scheduler: Literal["euler", "pipeline"] = "euler",
    ) -> Tensor:
        """Clean latents (B, C, F, H, W) fp32, without any noise on the way: what evaluation and users see.

        Starts from the noise that `rollout` starts from for the same seed. "euler" walks the training grid; "pipeline"
        is the stock WanPipeline with the scheduler of its folder (UniPC for the published Wan 2.1).
        """
        self._require_vae()
        if len(prompts) != len(seeds):
            raise ValueError(
                f"sample needs one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds"
            )
        if scheduler not in ("euler", "pipeline"):
            raise ValueError(
                f"scheduler must be 'euler' or 'pipeline', got {scheduler!r}"
            )
        cfg = self.cfg.sampler
        steps = num_steps or cfg.num_steps
        sigmas = sigma_grid(steps, shift=cfg.shift).tolist()

        def walk(row_B: Tensor) -> Tensor:
            part = [prompts[row] for row in row_B.tolist()]
            noises = [
                initial_noise(seeds[row], self.latent_shape) for row in row_B.tolist()
            ]
            x_BCFHW = torch.stack(noises).to(self.device)
            if scheduler == "pipeline":
                return self._stock(x_BCFHW, part, steps)
            return ode(lambda x, sigma: self._guided(x, sigma, part), x_BCFHW, sigmas)

        self.portions.fixed = self.sharded
        return self.portions.over(walk, torch.arange(len(prompts)))

    def decode(self, clean_BCFHW: Tensor) -> Tensor:
        """uint8 video (B, T, Y, X, 3) on the CPU, byte for byte what WanPipeline makes of these latents. No grad."""
        return self.codec.decode(clean_BCFHW.to(self.device))

    def encode(self, video_BTYXC: Tensor) -> Tensor:
        """uint8 video -> normalised latents (B, C, F, H, W) fp32, the posterior mean. No grad."""
        return self.codec.encode(video_BTYXC, device=self.device)

    # ---- likelihood and error, with grad --------------------------------------------------------------------------

    def transition(
        self, prompt: str, step: Step, member: int | None = None
    ) -> Gaussian:
        """Law of `next` given the latent: mean (M, C, F, H, W), grad through the mean.

        c' DiT sample-forwards for a latent that all members share, however many they are, c' G for their own; c' = c,
        or 1 when guidance_in_update is off. ``member`` asks for one alone, by a forward of its own.
        """
        scale = self.cfg.sampler.guidance_scale if self.cfg.guidance_in_update else 1.0
        x_MCFHW = (step.latent_MCFHW if member is None else step.start_of(member)).to(
            self.device
        )
        sigma_M = torch.full((len(x_MCFHW),), step.sigma)
        v_MCFHW = self.velocity(
            x_MCFHW, sigma_M, [prompt] * len(x_MCFHW), guidance_scale=scale
        )
        return self.kernel.transition(x_MCFHW, v_MCFHW, step.sigma, step.sigma_next)

    def flow_error(
        self,
        clean_BCFHW: Tensor,
        noise_BCFHW: Tensor,
        sigma_B: Tensor,
        prompts: Sequence[str],
    ) -> Tensor:
        """|v_theta(x_sigma) - (eps - x_0)|^2, MEAN over latent elements -> (B,) fp32, with grad. Without guidance.

        The term of Flow-DPO (2501.13918, equation 6), where it is a sum: with the mean, beta does not depend on size.
        """
        clean_BCFHW, noise_BCFHW = (
            clean_BCFHW.to(self.device),
            noise_BCFHW.to(self.device),
        )
        x_BCFHW = interpolate(clean_BCFHW, noise_BCFHW, sigma_B)
        v_BCFHW = self.velocity(x_BCFHW, sigma_B, prompts, guidance_scale=1.0)
        return (
            (v_BCFHW - velocity_target(clean_BCFHW, noise_BCFHW))
            .square()
            .flatten(1)
            .mean(dim=1)
        )

    def velocity(
        self,
        x_BCFHW: Tensor,
        sigma_B: Tensor,
        prompts: Sequence[str],
        *,
        guidance_scale: float,
    ) -> Tensor:
        """v at (x, sigma) for one prompt per sample -> (B, C, F, H, W), fp32 (fp64 for an fp64 module).

        Scale 1 is one forward of B samples; else the conditional and the unconditional branch go as one batch of 2 B.
        The timestep is 1000 sigma as fp32, not an integer. Raises RuntimeError under `reference` with grad enabled.
        """
        if self._in_reference and torch.is_grad_enabled():
            raise RuntimeError(
                "the reference runs under torch.no_grad() only: gradient checkpointing recomputes after `reference` "
                "has closed, with the adapter on again"
            )
        texts = list(prompts)
        if not len(x_BCFHW) == len(sigma_B) == len(texts):
            raise ValueError(
                f"velocity got {len(x_BCFHW)} latents, {len(sigma_B)} sigmas, {len(texts)} prompts"
            )
        guided = guidance_scale != 1
        if guided:
            texts += [self.cfg.sampler.negative_prompt] * len(texts)
            x_BCFHW, sigma_B = (
                torch.cat([x_BCFHW, x_BCFHW]),
                torch.cat([sigma_B, sigma_B]),
            )
        module, transformer = self._active()
        if module.training:  # asking costs nothing, telling every submodule cost a tenth of a tiny model's forward
            module.eval()
        dtype = transformer.patch_embedding.weight.dtype
        out = module(
            hidden_states=x_BCFHW.to(self.device, dtype),
            timestep=1000
            * sigma_B.to(
                self.device, torch.float32
            ),  # rounded as diffusers' Euler scheduler rounds it
            encoder_hidden_states=self.prompts.get(
                texts, device=self.device, dtype=dtype
            ),
            return_dict=False,
        )[0]
        v = widen(out)
        return guide(*v.chunk(2), guidance_scale) if guided else v

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the generator is the base model: the adapter is off, or (without LoRA) a frozen copy runs.

        Under torch.no_grad() only, see `velocity`. The copy is read from cfg.path at the first use, so it is the base
        model whatever has been trained or resumed since, and costs nothing where no KL is asked for. May be nested.
        """
        if self._in_reference:
            yield
            return
        self._in_reference = True
        try:
            if self.cfg.lora is not None:
                with switched_off(self.module):
                    yield
            else:
                if self._frozen is None:
                    self._frozen = self._load_frozen()
                yield
        finally:
            self._in_reference = False

    # ---- prompts and weights --------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        """Put these prompts' embeddings, and the negative prompt's, into the cache."""
        self.prompts.encode([*prompts, self.cfg.sampler.negative_prompt])

    def given_prompts(
        self, embedding_LD: Mapping[str, Tensor]
    ) -> AbstractContextManager[None]:
        """See `generator.prompts.PromptCache.given`."""
        return self.prompts.given(embedding_LD)

    def free_text_encoder(self) -> None:
        """Drop the text encoder from memory. Prompts encoded before go on working, new ones raise RuntimeError."""
        self.encode_prompts([])
        self.prompts.free_text_encoder()

    def save_trained(
        self, folder: Path | str, state_dict: Mapping[str, Tensor] | None = None
    ) -> Path:
        """Write what was trained; returns the file. One rank calls it.

        An adapter for stock `WanPipeline.load_lora_weights(folder)`; without LoRA the whole transformer, as
        folder/transformer in diffusers' layout. ``state_dict`` replaces the module's own (gathered from its shards).
        """
        if self.cfg.lora is None:
            return weights.save(self.module, Path(folder), state_dict)
        return adapter.save(self.module, Path(folder), state_dict)

    def load_trained(self, folder: Path | str) -> None:
        """Read what `save_trained` wrote, before an engine is built. A whole transformer replaces the base under an
        adapter too. ValueError when it does not fit, or is an adapter and GeneratorConfig.lora is null;
        FileNotFoundError when there is neither.
        """
        if weights.is_whole(Path(folder)):
            weights.load(self._active()[1], Path(folder))
        elif self.cfg.lora is None:
            raise ValueError(
                f"GeneratorConfig.lora is null and {folder} holds no whole transformer"
            )
        elif not (Path(folder) / adapter.ADAPTER_FILE).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {adapter.ADAPTER_FILE}; a run leaves its adapter in RUN/final"
            )
        else:
            adapter.load(self.module, Path(folder))

    def _require_vae(self) -> None:
        if self._pipeline.vae is None:
            raise RuntimeError(
                "this generator was loaded without its VAE, to train on given latents: it cannot sample"
            )

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _guided(
        self,
        x_BCFHW: Tensor,
        sigma: float,
        prompts: Sequence[str],
        *,
        scale: float | None = None,
    ) -> Tensor:
        sigma_B = torch.full((len(x_BCFHW),), sigma)
        guidance = self.cfg.sampler.guidance_scale if scale is None else scale
        return self.velocity(x_BCFHW, sigma_B, prompts, guidance_scale=guidance)

    def _tail(self, x_BCFHW: Tensor, sigmas: Sequence[float], prompt: str) -> Tensor:
        """To the end of the grid, as the sampler's tail options say."""
        cfg, texts = self.cfg.sampler, [prompt] * len(x_BCFHW)
        if cfg.tail_steps is not None and cfg.tail_steps < len(sigmas) - 1:
            sigmas = tail_grid(sigmas[0], cfg.tail_steps, shift=cfg.shift).tolist()
        walk = ode_ab2 if cfg.tail_solver == "ab2" else ode
        if cfg.tail_cache == 1:
            return walk(
                lambda x, at: self._guided(x, at, texts, scale=cfg.tail_guidance),
                x_BCFHW,
                sigmas,
            )
        cache, calls = BlockCache(self._active()[1]), itertools.count()

        def cached(x: Tensor, at: float) -> Tensor:
            with cache.call(again=next(calls) % cfg.tail_cache > 0):
                return self._guided(x, at, texts, scale=cfg.tail_guidance)

        return walk(cached, x_BCFHW, sigmas)

    def _idle_calls(self, group_size: int, seeds: Sequence[int], iteration: int) -> int:
        """How many calls of a rollout this rank lacks to the rank with most. Ask before: then all are at one place."""
        cfg = self.cfg.sampler
        own = sum(
            velocity_calls(
                stochastic_steps(seed, cfg, iteration=iteration),
                cfg.num_steps,
                group_size,
                self.portions.size or group_size,
                shared_noise=cfg.initial_noise == "shared",
                tail_steps=cfg.tail_steps,
            )
            for seed in seeds
        )
        return int(max_over_ranks(own)) - own

    def _stock(self, x_BCFHW: Tensor, prompts: Sequence[str], num_steps: int) -> Tensor:
        _, transformer = self._active()
        self._pipeline.transformer = transformer
        where = {
            "device": self.device,
            "dtype": transformer.patch_embedding.weight.dtype,
        }
        return self._pipeline(
            prompt_embeds=self.prompts.get(prompts, **where),
            negative_prompt_embeds=self.prompts.get(
                [self.cfg.sampler.negative_prompt] * len(prompts), **where
            ),
            height=self.cfg.height,
            width=self.cfg.width,
            num_frames=self.cfg.num_frames,
            num_inference_steps=num_steps,
            guidance_scale=self.cfg.sampler.guidance_scale,
            latents=x_BCFHW,
            output_type="latent",
        ).frames.float()

    def _active(self) -> tuple[nn.Module, WanTransformer3DModel]:
        """(what to call, the transformer inside it) of the policy, or of the reference."""
        if self.cfg.lora is not None:
            return self.module, self.module.get_base_model()
        if self._in_reference:
            return self._frozen, self._frozen
        return self.module, self.module

    def _load_frozen(self) -> WanTransformer3DModel:
        dtype = getattr(torch, self.cfg.dtype)
        model = WanTransformer3DModel.from_pretrained(
            self.cfg.path, subfolder="transformer", dtype=dtype
        )
        return (
            weights.of_one_dtype(model, self.cfg.dtype)
            .requires_grad_(requires_grad=False)
            .eval()
            .to(self.device)
        )
