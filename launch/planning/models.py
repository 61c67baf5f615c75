"""Build the models of a plan on the meta device, and measure their sizes and the cost of a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.files import read_json
from common.shipped import shipped
from launch.planning import known_models
from launch.planning.meta_device import Cost, cost_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from torch import Tensor, nn

    from generator.config import GeneratorConfig
    from rm.config import BackboneLora, LearningRates, VideoSettings
    from rm.model import DeScore

# Token counts of the released runs: DeScore's instruction with its prompt, a chain of thought
PROMPT_TOKENS = 500
COT_TOKENS = 800
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
    """Transformer, VAE and text encoder of a `GeneratorConfig` on the meta device."""

    def __init__(self, cfg: GeneratorConfig) -> None:
        self.cfg = cfg
        self.dtype = getattr(torch, cfg.dtype)
        self._published = cfg.path in known_models.WAN

    @cached_property
    def transformer(self) -> WanTransformer3DModel:
        """The transformer without adapter, in the data types of a run."""
        from diffusers import WanTransformer3DModel

        # Weights are not needed, only shapes.
        known = known_models.WAN.get(self.cfg.path)
        config = _config_of(self.cfg.path, "transformer", known)
        with torch.device("meta"):
            module = WanTransformer3DModel.from_config(config)
        if self.cfg.gradient_checkpointing:
            module.enable_gradient_checkpointing()

        # diffusers loads some modules in fp32; a run that trains all weights holds one dtype.
        in_fp32: set[str] = set()
        if self.cfg.lora is not None:
            in_fp32.update(module._keep_in_fp32_modules or ())
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
        """The VAE, in fp32."""
        from diffusers import AutoencoderKLWan

        # A folder has its config; published sizes share that of Wan 2.1.
        known = known_models.WAN_VAE if self._published else None
        config = _config_of(self.cfg.path, "vae", known)
        with torch.device("meta"):
            return AutoencoderKLWan.from_config(config).eval()

    @cached_property
    def text_encoder(self) -> nn.Module:
        """The text encoder, UMT5."""
        from transformers import UMT5Config, UMT5EncoderModel

        known = known_models.UMT5_XXL if self._published else None
        config = UMT5Config(**_config_of(self.cfg.path, "text_encoder", known))
        with torch.device("meta"):
            return UMT5EncoderModel(config).to(self.dtype)

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

    def forward(
        self,
        samples: int,
        *,
        grad: bool,
    ) -> Cost:
        """Measure the transformer on ``samples`` latents; ``grad`` includes the backward."""
        # The prompt is padded to its longest length.
        text_shape = (
            samples,
            self.cfg.max_sequence_length,
            self.transformer.config.text_dim,
        )

        def velocity() -> Tensor:
            return self.module(
                hidden_states=_meta(samples, *self.latent_shape, dtype=self.dtype),
                timestep=_meta(samples),
                encoder_hidden_states=_meta(*text_shape, dtype=self.dtype),
                return_dict=False,
            )[0]

        return _cost_of_pass(self.module, velocity, grad=grad)

    def decode(self, videos: int) -> Cost:
        """Measure the VAE from the latents of ``videos`` to pixels."""
        latent_BCFHW = _meta(videos, *self.latent_shape)

        def run() -> None:
            with torch.no_grad():
                self.vae.decode(latent_BCFHW, return_dict=False)

        return cost_of(run)


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
    """A DeScore on a Qwen3-VL, on the meta device.

    name      A folder of a DeScore or of a Qwen3-VL, or a hub name. Where the folder does not
              exist, `known_models.closest_qwen3_vl` replaces it.
    settings  How it reads videos; None takes the folder's video.json, or the defaults.
    """

    def __init__(
        self,
        name: str,
        *,
        dtype: str,
        settings: VideoSettings | None = None,
    ) -> None:
        from rm.config import VideoSettings

        # A model that does not exist yet is planned as a published one.
        there = name and Path(name).is_dir()
        self.name = name if there else known_models.closest_qwen3_vl(name)
        self.dtype = getattr(torch, dtype)
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
        from rm.prompt import DEFAULT_TEMPLATE

        # The patches of the vision tower follow the model, not the defaults.
        config = _config_of(self.name, "", known_models.QWEN3_VL.get(self.name))
        patch_size = config["vision_config"]["patch_size"]
        self.settings = replace(self.settings, patch_size=patch_size)
        tokenizer = AutoTokenizer.from_pretrained(shipped(_TOKENIZER).as_posix())
        with torch.device("meta"):
            backbone = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
            backbone = backbone.to(self.dtype)
            return DeScore(
                backbone,
                tokenizer,
                DEFAULT_TEMPLATE,
                self.settings,
                0,
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
        self.checkpointing = checkpointing
        if checkpointing:
            self.model.backbone.gradient_checkpointing_enable({"use_reentrant": False})

    def read(
        self,
        rows: int,
        lengths: Lengths,
        *,
        places: int,
        grad: bool,
    ) -> Cost:
        """Measure ``rows`` sequences of ``places`` tokens, each with its video.

        The cost is that of the vision tower and the language model; ``grad`` includes the backward.
        """
        backbone = self.model.backbone.model
        # transformers recomputes blocks in training mode alone.
        self.model.train(self.checkpointing and grad)
        width = self.model.head.weight.shape[1]
        num_patches = rows * lengths.grid[0] * lengths.grid[1] * lengths.grid[2]
        patch_values = (
            self.settings.temporal_patch_size * 3 * self.settings.patch_size**2
        )

        def hidden_states() -> Tensor:
            # The vision tower turns patches into tokens of the language model. The
            # patches stay alive, as the batch of a run does.
            patches = _meta(num_patches, patch_values, dtype=self.dtype)
            grids = torch.tensor([lengths.grid] * rows)
            video = backbone.visual(patches, grid_thw=grids).pooler_output
            if not isinstance(video, torch.Tensor):
                video = torch.cat(list(video))
            video = video.view(rows, lengths.video, width)

            # The language model reads them together with the texts.
            text = _meta(
                rows,
                places - lengths.video,
                width,
                dtype=self.dtype,
            )
            embedded = torch.cat([video, text], dim=1)
            if grad and not embedded.requires_grad:
                embedded.requires_grad_()
            return backbone.language_model(
                inputs_embeds=embedded,
                position_ids=position,
                use_cache=False,
            )[0]

        # Positions carry no cost; zeros serve.
        position = torch.zeros(
            3,
            rows,
            places,
            dtype=torch.long,
            device="meta",
        )
        return _cost_of_pass(self.model, hidden_states, grad=grad)

    def cache_bytes(self, places: int) -> float:
        """Bytes of the keys and values of a sequence of ``places`` tokens."""
        # Keys and values of every layer.
        text = self.model.backbone.config.text_config
        width = text.num_key_value_heads * text.head_dim
        values = 2.0 * text.num_hidden_layers * width * places
        return values * self.dtype.itemsize

    @cached_property
    def decoder(self) -> Sizes:
        """Sizes of what every written token passes: the language model and the output matrix.

        The embedding does not count, because its rows are read and not multiplied.
        """
        # The output matrix may be that of the embedding.
        backbone = self.model.backbone
        language = backbone.model.language_model
        passed = [language.layers, language.norm, backbone.lm_head]
        return sizes_of(torch.nn.ModuleList(passed))


def _cost_of_pass(
    module: nn.Module,
    output: Callable[[], Tensor],
    *,
    grad: bool,
) -> Cost:
    """Measure ``output``, and with ``grad`` a backward from it; gradients are freed afterwards."""

    def run() -> None:
        with torch.set_grad_enabled(grad):
            result = output()
            if grad:
                # Any scalar of the output has the same backward.
                result.float().square().mean().backward()
        module.zero_grad(set_to_none=True)

    return cost_of(run)


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
