"""EXPERIMENTAL: generate chains of thought with vLLM. Never run with a real vLLM so far.

The tests use a stand-in (tests/fakes_vllm) that follows vLLM's documentation; check the first real
run against `rm.cot_backend.HfBackend`.

vLLM runs in another process and Python environment, since its pins clash with ours. Every rank
starts a process on its GPU at the first sync. The process (`rm/vllm/worker.py`) answers lines of
JSON (`common.line_process`); frames, prompts, tokens and weights are safetensors files in a private
temporary folder. That folder is a stock Qwen3-VL: LoRA merged, our tokenizer, and processor
settings that treat frames as `rm.video` does. A sync writes the weights again, a file for each
rank, and vLLM reloads them: ``collective_rpc("reload_weights")``, as its page on sleep mode says.

vLLM takes the prompt with a single ``<|vision_start|><|video_pad|><|vision_end|>`` and replaces it,
for each temporal patch, by the ids of "<{t:.1f} seconds>", vision start, pads and vision end. The
ids that it reports must be ours, else the answer is an error. It tokenises a time stamp separately,
so the template's ``before`` must end where no token joins it to a "<": in a newline, for example.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import load_tensors, save_tensors
from common.line_process import LineProcess, LineProcessError, foreign_environment
from common.lora import merged_backbone
from rm.config import CotBackendConfig, Generation, VideoSettings
from rm.model import DeScore
from rm.packed import PackedCot
from rm.prompt import VISION_END, VISION_START, Encoded, encode_text, token_id
from rm.video import PreparedVideo, frames_of

SCRIPT = Path(__file__).with_name("worker.py")
# Earlier versions misread the rotary settings of the config.json that ours writes.
MIN_TRANSFORMERS = 5


class VllmBackend:
    """Implements `rm.cot_backend.CotBackend` with vLLM.

    Raises ValueError or FileNotFoundError for a model or an interpreter that do not suit it, and
    LineProcessError, with the end of the process's stderr, when the process dies, times out or
    breaks the protocol.
    """

    def __init__(self, cfg: CotBackendConfig, model: DeScore) -> None:
        if cfg.python is None or shutil.which(cfg.python) is None:
            raise FileNotFoundError(
                f"cot_backend.python={cfg.python}: there is no such interpreter"
            )
        check_model(model)
        self.cfg = cfg
        self.model = model
        self.vision_start = token_id(model.tokenizer, VISION_START)
        self.vision_end = token_id(model.tokenizer, VISION_END)
        self.banned = model.banned_ids()
        # The version of the weights that vLLM holds; None while it holds none.
        self.version: int | None = None
        self.process: LineProcess | None = None
        # mkdtemp makes a folder that only this user can read.
        self.folder = Path(tempfile.mkdtemp(prefix="vllm-", dir=cfg.folder))
        self._remove = weakref.finalize(
            self, shutil.rmtree, self.folder, ignore_errors=True
        )

    def sync(self, version: int) -> None:
        """Give vLLM the model's present weights, under the name ``version``."""
        if version == self.version:
            return
        self.version = None
        # The first sync starts the process, later ones make it reload the weights.
        if self.process is None:
            save_stock(self.model, self.folder / "model")
            self._start(version)
        else:
            save_weights(self.model, self.folder / "model")
            self._ask("load", version=version)
        self.version = version

    def write(
        self,
        encoded: Sequence[Encoded],
        videos: Sequence[PreparedVideo],
        how: Generation,
        *,
        version: int,
        seeds: Sequence[int] | None = None,
        copies: int = 1,
    ) -> list[list[PackedCot]]:
        """Generate ``copies`` chains of thought for each sequence.

        RuntimeError if vLLM's weights are not ``version``, or if it chose a banned id.
        """
        if version != self.version:
            raise RuntimeError(
                f"stale weights: vLLM has version {self.version}, not {version}"
            )
        self._check_request(encoded, how, seeds, copies)

        # Send the request.
        request = self.folder / "request.safetensors"
        reply = self.folder / "reply.safetensors"
        save_tensors(request, self._request(encoded, videos, seeds))
        sampling = {
            "temperature": how.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "repetition_penalty": how.repetition_penalty,
            "max_tokens": how.max_new_tokens,
            # Only the end of the turn ends a chain of thought.
            "stop_token_ids": [self.model.end_id],
            "ignore_eos": True,
        }
        self._ask(
            "write",
            version=version,
            request=str(request),
            reply=str(reply),
            copies=copies,
            sampling=sampling,
        )
        arrays = load_tensors(reply)
        request.unlink()
        reply.unlink()

        # Check and split the tokens.
        tokens = arrays["tokens"]
        banned = tokens[self.banned[tokens]]
        if len(banned):
            raise RuntimeError(f"vLLM chose banned ids: {banned.unique().tolist()[:8]}")
        chains = []
        rows = tokens.split(arrays["length"].tolist())
        for row, finished in zip(rows, arrays["finished"].tolist(), strict=True):
            chains.append(PackedCot(tuple(row.tolist()), finished))
        return [chains[i : i + copies] for i in range(0, len(chains), copies)]

    def rest(self) -> None:
        """Free vLLM's memory until the next sync."""
        if self.cfg.sleep and self.version is not None:
            self.version = None
            self._ask("rest")

    def close(self) -> None:
        """End the process and delete the folder."""
        self.version = None
        if self.process is not None:
            self.process.end()
        self._remove()

    # ------------------------------------------------------------------ the process

    def _start(self, version: int) -> None:
        self.process = LineProcess(
            # -P keeps the script's folder off the worker's import path.
            [self.cfg.python, "-P", str(SCRIPT)],
            stderr=self.folder / "stderr.txt",
            env=self._environment(),
            grace_s=60.0,
        )
        options = {
            "dtype": str(self.model.backbone.dtype).removeprefix("torch."),
            "max_model_len": self.cfg.max_model_len,
            "gpu_memory_utilization": self.cfg.gpu_memory,
            "limit_mm_per_prompt": {"image": 0, "video": 1},
            "enable_sleep_mode": self.cfg.sleep,
            # No sampling settings but those of the request.
            "generation_config": "vllm",
            "seed": 0,
            **self.cfg.engine_args,
        }
        folder = str(self.folder / "model")
        reply = self._ask("start", model=folder, options=options, version=version)
        if int(reply["transformers"].partition(".")[0]) < MIN_TRANSFORMERS:
            self.close()
            raise ValueError(
                f"{self.cfg.python} has transformers {reply['transformers']}, "
                f"but needs {MIN_TRANSFORMERS} or later"
            )

    def _ask(self, command: str, **message: Any) -> dict[str, Any]:
        """Send a command; the reply must have the version that the message has."""
        message["command"] = command
        reply = self.process.ask(message, timeout_s=self.cfg.timeout_s)
        if reply["version"] != message.get("version"):
            raise LineProcessError(f"{SCRIPT.name} answered {reply} to {message}")
        return reply

    def _environment(self) -> dict[str, str]:
        device = self.model.device
        gpu = (device.index or 0) if device.type == "cuda" else None
        # The folder is complete: nothing is downloaded, and no usage statistics are sent.
        environment = foreign_environment(gpu)
        environment["HF_HUB_OFFLINE"] = "1"
        environment["VLLM_NO_USAGE_STATS"] = "1"
        return {**environment, **self.cfg.env}

    # ------------------------------------------------------------------ the request

    def _check_request(
        self,
        encoded: Sequence[Encoded],
        how: Generation,
        seeds: Sequence[int] | None,
        copies: int,
    ) -> None:
        # Greedy generation has no seeds, sampling has one for each copy.
        wanted = len(encoded) * copies if how.temperature > 0 else 0
        if len(seeds or ()) != wanted:
            raise ValueError(
                f"{len(encoded)} prompts with {copies} copies at temperature={how.temperature} "
                f"need {wanted} seeds, got {seeds}"
            )
        prompt = max((len(item.prompt_ids) for item in encoded), default=0)
        if prompt + how.max_new_tokens > self.cfg.max_model_len:
            raise ValueError(
                f"a prompt of {prompt} tokens and {how.max_new_tokens} new ones exceed "
                f"cot_backend.max_model_len={self.cfg.max_model_len}"
            )

    def _request(
        self,
        encoded: Sequence[Encoded],
        videos: Sequence[PreparedVideo],
        seeds: Sequence[int] | None,
    ) -> dict[str, Tensor]:
        arrays = {"banned": self.banned.nonzero().squeeze(1)}
        if seeds is not None:
            arrays["seeds"] = torch.tensor(list(seeds))
        settings = self.model.settings
        for b, (item, video) in enumerate(zip(encoded, videos, strict=True)):
            arrays[f"short_{b}"] = torch.tensor(self.short_prompt(item, video))
            arrays[f"full_{b}"] = torch.tensor(item.prompt_ids)
            arrays[f"frames_{b}"] = frames_of(video, settings)
            # vLLM takes the mean over the frames of a temporal patch: equal times stay exact.
            times = torch.tensor(video.times, dtype=torch.float64)
            stamps = times.repeat_interleave(settings.temporal_patch_size)
            arrays[f"stamps_{b}"] = stamps
        return arrays

    def short_prompt(self, encoded: Encoded, video: PreparedVideo) -> list[int]:
        """Return the prompt with one placeholder, which vLLM expands to ``prompt_ids``.

        ValueError if it would expand to other ids.
        """
        # Expand the video as vLLM does.
        tokenizer = self.model.tokenizer
        pad = self.model.video_pad_id
        ids = list(encoded.prompt_ids)
        _, height, width = video.grid
        pads = [pad] * (height * width // self.model.settings.merge_size**2)
        patch = [self.vision_start, *pads, self.vision_end]
        expanded: list[int] = []
        for time in video.times:
            expanded += [*encode_text(tokenizer, f"<{time:.1f} seconds>"), *patch]

        # The prompt must hold exactly these ids.
        first = expanded.index(self.vision_start)
        start = ids.index(self.vision_start) - first
        end = start + len(expanded)
        if ids[start:end] != expanded:
            raise ValueError(f"vLLM would expand the prompt otherwise at token {start}")
        return [*ids[:start], self.vision_start, pad, self.vision_end, *ids[end:]]


def check_model(model: DeScore) -> None:
    """Check what vLLM assumes about a model: its patch sizes, and tokens around a time stamp."""
    settings = model.settings
    if settings.temporal_patch_size != settings.merge_size:
        raise ValueError(
            f"temporal_patch_size={settings.temporal_patch_size} must equal "
            f"merge_size={settings.merge_size}: vLLM pairs the times of frames by the latter"
        )

    # vLLM tokenises a time stamp apart from the text before it.
    before = model.template.before
    stamp = "<0.5 seconds>"
    apart = encode_text(model.tokenizer, before) + encode_text(model.tokenizer, stamp)
    if apart != encode_text(model.tokenizer, before + stamp):
        raise ValueError(
            f"a token joins the template's `before`, {before[-12:]!r}, to the time stamp, which "
            "vLLM tokenises separately: end `before` with a newline"
        )


def save_stock(model: DeScore, path: Path) -> None:
    """Write the folder that vLLM loads: a stock Qwen3-VL with tokenizer and processor."""
    config = copy.deepcopy(model.backbone.config)
    config.architectures = [type(model.backbone).__name__]
    config.dtype = model.backbone.dtype
    config.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    save_processor(model.settings, path)
    save_weights(model, path)


def save_weights(model: DeScore, path: Path) -> None:
    """Write model.safetensors atomically. transformers' save_pretrained writes on rank 0 only."""
    from safetensors.torch import save_file

    backbone = model.backbone
    weights = merged_backbone(backbone, model.state_dict(), backbone.dtype)
    # Tied weights are stored once.
    if backbone.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, path / "next", metadata={"format": "pt"})
    os.replace(path / "next", path / "model.safetensors")


def save_processor(settings: VideoSettings, path: Path) -> None:
    """Write the two files of a Qwen3-VL's processor; vLLM plans its memory by ``size``."""
    most = settings.max_pixels
    if settings.budget == "frame":
        most *= settings.max_frames
    content: dict[str, Any] = {
        "size": {"shortest_edge": settings.min_pixels, "longest_edge": most},
        "patch_size": settings.patch_size,
        "temporal_patch_size": settings.temporal_patch_size,
        "merge_size": settings.merge_size,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "processor_class": "Qwen3VLProcessor",
    }
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessorFast"
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen3VLVideoProcessor"
        },
    }
    for name, kind in files.items():
        text = json.dumps({**content, **kind}, indent=1)
        (path / name).write_text(text + "\n", encoding="utf-8")
