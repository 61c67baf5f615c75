"""The models of a plan: built on the meta device from their configs, what they weigh and what a call of them costs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from launch.planning import known_models
from launch.planning.meta_device import Cost, cost_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from torch import Tensor, nn

    from generator.config import GeneratorConfig
    from rm.config import BackboneLora, LearningRates, VideoSettings

PROMPT_TOKENS = 500  # of DeScore's instruction with its prompt; and of a chain of thought: counts of the released runs
CHAIN_TOKENS = 800
_TOKENIZER = (
    Path(__file__).resolve().parents[2] / "assets" / "shapes" / "qwen"
)  # any will do: no text is read


class UnknownModelError(ValueError):
    """A model whose size is neither known here nor readable from a folder."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of a module, and bytes of its weights as they are held."""

    parameters: int
    trained: int
    bytes: int
    trained_bytes: int


def sizes_of(module: nn.Module) -> Sizes:
    every = list(module.parameters())
    trained = [p for p in every if p.requires_grad]
    return Sizes(_count(every), _count(trained), _bytes(every), _bytes(trained))


class WanOnMeta:
    """Transformer, VAE and text encoder of a `GeneratorConfig`."""

    def __init__(self, cfg: GeneratorConfig) -> None:
        self.cfg = cfg

    @cached_property
    def transformer(self) -> WanTransformer3DModel:
        from diffusers import WanTransformer3DModel

        from generator import weights

        config = _config_of(
            self.cfg.path, "transformer", known_models.WAN.get(self.cfg.path)
        )
        with torch.device("meta"):
            module = WanTransformer3DModel.from_config(config)
        kept = (
            tuple(module._keep_in_fp32_modules or ())
            if self.cfg.lora is not None
            else ()
        )
        for name, parameter in module.named_parameters():
            wide = any(part in name.split(".") for part in kept)
            parameter.data = parameter.data.to(
                torch.float32 if wide else getattr(torch, self.cfg.dtype)
            )
        if self.cfg.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        return (
            weights.of_one_dtype(module, self.cfg.dtype)
            if self.cfg.lora is None
            else module
        )

    @cached_property
    def module(self) -> nn.Module:
        """With its adapter, as a run trains it."""
        from generator import adapter

        if self.cfg.lora is None:
            return self.transformer.requires_grad_(requires_grad=True).eval()
        with torch.device("meta"):
            return adapter.attach(self.transformer, self.cfg.lora, seed=0).eval()

    @cached_property
    def vae(self) -> AutoencoderKLWan:
        from diffusers import AutoencoderKLWan

        known = known_models.WAN_VAE if self.cfg.path in known_models.WAN else None
        with torch.device("meta"):
            return AutoencoderKLWan.from_config(
                _config_of(self.cfg.path, "vae", known)
            ).eval()

    @cached_property
    def text_encoder(self) -> nn.Module:
        from transformers import UMT5Config, UMT5EncoderModel

        known = known_models.UMT5_XXL if self.cfg.path in known_models.WAN else None
        with torch.device("meta"):
            module = UMT5EncoderModel(
                UMT5Config(**_config_of(self.cfg.path, "text_encoder", known))
            )
        return module.to(getattr(torch, self.cfg.dtype)).eval()

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, F, H, W) of one video."""
        from generator.latents import LatentCodec

        how, patch = self.cfg, self.transformer.config.patch_size
        codec = LatentCodec(self.vae, batch=1)
        return codec.latent_shape(
            height=how.height, width=how.width, num_frames=how.num_frames, patch=patch
        )

    @property
    def tokens(self) -> int:
        """Of a video in the transformer."""
        _, frames, height, width = self.latent_shape
        t, y, x = self.transformer.config.patch_size
        return (frames // t) * (height // y) * (width // x)

    def forward(self, samples: int, *, grad: bool) -> Cost:
        """Of the transformer on so many samples: without gradient, or with, backward included."""
        return _cost_of_pass(
            self.module,
            lambda: self.module(**self._inputs(samples), return_dict=False)[0],
            grad=grad,
        )

    def decode(self, videos: int) -> Cost:
        """Of the VAE, from latents to pixels."""
        latent_BCFHW = torch.empty(videos, *self.latent_shape, device="meta")

        def run() -> None:
            with torch.no_grad():
                self.vae.decode(latent_BCFHW, return_dict=False)

        return cost_of(run)

    def encode_text(self) -> Cost:
        """Of one prompt."""

        def run() -> None:
            with torch.no_grad():
                self.text_encoder(
                    torch.zeros(
                        1, self.cfg.max_sequence_length, dtype=torch.long, device="meta"
                    )
                )

        return cost_of(run)

    def _inputs(self, samples: int) -> dict[str, Tensor]:
        config, dtype = self.transformer.config, getattr(torch, self.cfg.dtype)
        text = (samples, self.cfg.max_sequence_length, config.text_dim)
        return {
            "hidden_states": torch.empty(
                samples, *self.latent_shape, device="meta", dtype=dtype
            ),
            "timestep": torch.empty(samples, device="meta"),
            "encoder_hidden_states": torch.empty(*text, device="meta", dtype=dtype),
        }


@dataclass(frozen=True)
class Lengths:
    """Tokens of one judged video: patches before merging as (t, h, w), places in the language model, and its texts."""

    grid: tuple[int, int, int]
    video: int
    prompt: int = PROMPT_TOKENS
    chain: int = CHAIN_TOKENS

    @property
    def whole(self) -> int:
        return self.video + self.prompt + self.chain


def lengths_of(
    settings: VideoSettings, *, frames: int, fps: float, height: int, width: int
) -> Lengths:
    """Of a video as `rm.video.prepare` reads it."""
    from rm.video import frame_indices, smart_resize

    seen = len(frame_indices(frames, fps, settings))
    y, x = smart_resize(seen, height, width, settings)
    t = -(-seen // settings.temporal_patch_size)
    grid = (t, y // settings.patch_size, x // settings.patch_size)
    return Lengths(grid, t * grid[1] * grid[2] // settings.merge_size**2)


class RewardModelOnMeta:
    """A DeScore on a Qwen3-VL.

    name  folder of one, of a plain Qwen3-VL, or a hub name; where there is no such folder, `known_models.judge_like` it
    """

    def __init__(
        self, name: str, *, dtype: str, settings: VideoSettings | None = None
    ) -> None:
        from rm.config import VideoSettings

        self.name = (
            name if name and Path(name).is_dir() else known_models.judge_like(name)
        )
        self.dtype, self.checkpointing = dtype, False
        file = Path(self.name, "video.json")
        self.settings = settings or (
            VideoSettings.load(file) if file.is_file() else VideoSettings()
        )

    @cached_property
    def model(self) -> Any:
        """`rm.model.DeScore`."""
        from transformers import (
            AutoTokenizer,
            Qwen3VLConfig,
            Qwen3VLForConditionalGeneration,
        )

        from rm.model import DeScore
        from rm.prompt import DEFAULT_TEMPLATE

        config = _config_of(self.name, "", known_models.QWEN3_VL.get(self.name))
        vision = config["vision_config"]
        self.settings = replace(self.settings, patch_size=vision["patch_size"])
        tokenizer = AutoTokenizer.from_pretrained(_TOKENIZER.as_posix())
        with torch.device("meta"):
            backbone = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config)).to(
                getattr(torch, self.dtype)
            )
            return DeScore(
                backbone, tokenizer, DEFAULT_TEMPLATE, self.settings, 0, None
            )

    def train(
        self, lr: LearningRates, lora: BackboneLora | None, *, checkpointing: bool
    ) -> None:
        """Free what a stage trains."""
        with torch.device("meta"):
            self.model.param_groups(lr, lora=lora, weight_decay=0.0)
        self.checkpointing = checkpointing
        if checkpointing:
            self.model.backbone.gradient_checkpointing_enable({"use_reentrant": False})

    def read(self, rows: int, lengths: Lengths, *, places: int, grad: bool) -> Cost:
        """Of ``rows`` videos, each with its own, through the tower and ``places`` of the language model."""
        inner, dtype = self.model.backbone.model, getattr(torch, self.dtype)
        self.model.train(self.checkpointing and grad)
        width, patch = self.model.head.weight.shape[1], self.settings.patch_size
        each = self.settings.temporal_patch_size * 3 * patch**2
        t, y, x = lengths.grid
        position = torch.zeros(3, rows, places, dtype=torch.long, device="meta")

        def hidden() -> Tensor:
            patches = torch.empty(rows * t * y * x, each, device="meta", dtype=dtype)
            seen = inner.visual(
                patches, grid_thw=torch.tensor([lengths.grid] * rows)
            ).pooler_output
            seen = seen if isinstance(seen, torch.Tensor) else torch.cat(list(seen))
            text = torch.empty(
                rows, places - lengths.video, width, device="meta", dtype=dtype
            )
            embedded = torch.cat([seen.view(rows, lengths.video, width), text], dim=1)
            if grad and not embedded.requires_grad:
                embedded.requires_grad_()
            return inner.language_model(
                inputs_embeds=embedded, position_ids=position, use_cache=False
            )[0]

        return _cost_of_pass(self.model, hidden, grad=grad)

    def cache_bytes(self, places: int) -> float:
        """Keys and values of one sequence."""
        text = self.model.backbone.config.text_config
        width = text.num_key_value_heads * text.head_dim
        return (
            2.0
            * text.num_hidden_layers
            * width
            * places
            * getattr(torch, self.dtype).itemsize
        )

    @property
    def language(self) -> Sizes:
        """What one written token has to pass: the language model and the vocabulary's matrix."""
        backbone = self.model.backbone
        own, last = sizes_of(backbone.model.language_model), sizes_of(backbone.lm_head)
        table = sizes_of(backbone.get_input_embeddings())  # looked up, not multiplied
        return Sizes(
            own.parameters + last.parameters - table.parameters,
            0,
            own.bytes + last.bytes - table.bytes,
            0,
        )


def _cost_of_pass(
    module: nn.Module, output: Callable[[], Tensor], *, grad: bool
) -> Cost:
    """Of what makes ``output``, and with ``grad`` of a backward from it too, whose gradients the module lets go."""

    def run() -> None:
        with torch.set_grad_enabled(grad):
            out = output()
            if grad:
                out.float().square().mean().backward()
        for parameter in module.parameters():
            parameter.grad = None

    return cost_of(run)


def _config_of(path: str, part: str, known: dict[str, Any] | None) -> dict[str, Any]:
    """A component's config: from a folder, or one that is known."""
    file = Path(path, part, "config.json")
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    if known is None:
        names = ", ".join([*known_models.WAN, *known_models.QWEN3_VL])
        raise UnknownModelError(
            f"{path}: neither a folder with {Path(part, 'config.json')} nor one of {names}"
        )
    return dict(known)


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
