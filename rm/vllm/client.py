"""Chains of thought by a vLLM in a process and an environment of its own, since its pins clash with ours.

Every rank starts one, on its own GPU, the first time it syncs. The process (`rm/vllm/worker.py`) is asked in lines of
JSON (`common.line_process`); frames, prompts, tokens and weights are safetensors files in a private temporary folder.
That folder is a stock Qwen3-VL: LoRA merged, our tokenizer, processor settings that do to frames what `rm.video` does.
A sync writes its weights anew, one file a rank, and vLLM reads them again: ``collective_rpc("reload_weights")``, as its
page on sleep mode says. Never run with a real vLLM here: the one in the tests is a fake (tests/fakes_vllm) that keeps
to what vLLM documents.

The prompt. vLLM takes the ids with ONE ``<|vision_start|><|video_pad|><|vision_end|>`` and puts in its place, for each
temporal patch, the ids of "<{t:.1f} seconds>", vision start, pads, vision end. The ids it says it continued must be
ours, else nothing is used. It makes a time stamp ids of its own, so the template's ``before`` must end where no token
joins it to a "<": in a newline, say, not in a space.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
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

SCRIPT = Path(__file__).with_name("vllm_worker.py")
TRANSFORMERS = (
    5  # earlier ones misread the rotary settings in the config.json that ours writes
)


class VllmBackend:
    """A `rm.cot_backend.CotBackend`.

    Raises ValueError or FileNotFoundError for a judge or an interpreter it cannot work with, LineProcessError (with the
    end of the process's stderr) when the process dies, does not answer in time or answers something else.
    """

    def __init__(self, cfg: CotBackendConfig, model: DeScore) -> None:
        if cfg.python is None or shutil.which(cfg.python) is None:
            raise FileNotFoundError(
                f"cot_backend.python={cfg.python}: there is no such interpreter"
            )
        settings = model.settings
        if settings.temporal_patch_size != settings.merge_size:
            raise ValueError(
                f"temporal_patch_size={settings.temporal_patch_size} and merge_size={settings.merge_size} differ: vLLM "
                "pairs the times of frames by the latter"
            )
        self.cfg, self.model = cfg, model
        self.vision_start, self.vision_end = (
            token_id(model.tokenizer, name) for name in (VISION_START, VISION_END)
        )
        self._check_stamp()
        self.banned = model.banned_ids()
        self.version: int | None = None  # of the weights in the engine; None: none
        self.process: LineProcess | None = None
        self.folder = Path(
            tempfile.mkdtemp(prefix="vllm-writer-", dir=cfg.folder)
        )  # for this user's eyes only
        self._remove = weakref.finalize(
            self, shutil.rmtree, self.folder, ignore_errors=True
        )

    def sync(self, version: int) -> None:
        if version == self.version:
            return
        self.version = None
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
        """RuntimeError if the engine's weights are not ``version``, or if it chose a banned id."""
        if version != self.version:
            raise RuntimeError(
                f"stale weights: the engine has version {self.version}, version {version} is wanted"
            )
        if (how.temperature > 0) != (seeds is not None):
            raise ValueError(
                f"seeds go with a temperature above 0, got temperature={how.temperature}, seeds={seeds}"
            )
        count = len(encoded) * copies
        if len(videos) != len(encoded) or (seeds is not None and len(seeds) != count):
            raise ValueError(
                f"{len(encoded)} prompts, {len(videos)} videos, {copies} copies, seeds {seeds}"
            )
        longest = (
            max((len(item.prompt_ids) for item in encoded), default=0)
            + how.max_new_tokens
        )
        if longest > self.cfg.max_model_len:
            raise ValueError(
                f"prompt and chain may have {longest} tokens, cot_backend.max_model_len={self.cfg.max_model_len}"
            )
        request, reply = (
            self.folder / "request.safetensors",
            self.folder / "reply.safetensors",
        )
        save_tensors(request, self._request(encoded, videos, seeds))
        sampling = {
            "temperature": how.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "repetition_penalty": how.repetition_penalty,
            "max_tokens": how.max_new_tokens,
            "stop_token_ids": [self.model.end_id],
            "ignore_eos": True,  # the end of the turn is the only end
        }
        self._ask(
            "write",
            version=version,
            request=str(request),
            reply=str(reply),
            copies=copies,
            sampling=sampling,
        )
        found = load_tensors(reply)
        for file in (request, reply):
            file.unlink()
        return self._chains(found, count, copies, limit=how.max_new_tokens)

    def rest(self) -> None:
        if self.cfg.sleep and self.version is not None:
            self.version = None
            self._ask("rest")

    def close(self) -> None:
        self.version = None
        if self.process is not None:
            self.process.end()
        self._remove()

    # ------------------------------------------------------------------ the process

    def _start(self, version: int) -> None:
        # -P: the script's folder, which is full of modules with common names, is not where the other side imports from
        command = [self.cfg.python, "-P", str(SCRIPT)]
        self.process = LineProcess(
            command,
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
            "generation_config": "vllm",  # nothing but what is asked for shapes the sampling
            "seed": 0,
            **self.cfg.engine_args,
        }
        found = self._ask(
            "start", model=str(self.folder / "model"), options=options, version=version
        )
        if int(str(found.get("transformers", "0")).partition(".")[0]) < TRANSFORMERS:
            self.close()
            raise ValueError(
                f"{self.cfg.python} has {found}; transformers must be {TRANSFORMERS} or later"
            )

    def _ask(self, command: str, **message: Any) -> dict[str, Any]:
        """The answer, which must have the version that the message has."""
        found = self.process.ask(
            {"command": command, **message}, timeout_s=self.cfg.timeout_s
        )
        if found.get("version", -1) != message.get("version"):
            raise LineProcessError(
                f"{SCRIPT.name} answered {found} to {command} with version {message.get('version')}"
            )
        return found

    def _environment(self) -> dict[str, str]:
        device = self.model.device
        inherited = foreign_environment(
            (device.index or 0) if device.type == "cuda" else None
        )
        # everything is in the folder: nothing is fetched, and nobody is told
        return {
            **inherited,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **self.cfg.env,
        }

    # ------------------------------------------------------------------ what goes over, and comes back

    def _request(
        self,
        encoded: Sequence[Encoded],
        videos: Sequence[PreparedVideo],
        seeds: Sequence[int] | None,
    ) -> dict[str, Tensor]:
        arrays = {"banned": self.banned.nonzero().squeeze(1)}
        if seeds is not None:
            arrays["seeds"] = torch.tensor(list(seeds))
        for b, (item, video) in enumerate(zip(encoded, videos, strict=True)):
            times = torch.tensor(video.times, dtype=torch.float64)
            arrays[f"short_{b}"] = torch.tensor(self.short_prompt(item, video))
            arrays[f"full_{b}"] = torch.tensor(item.prompt_ids)
            arrays[f"frames_{b}"] = frames_of(video, self.model.settings)
            # vLLM takes the mean over the frames of a temporal patch: of equal ones, so that nothing is rounded
            arrays[f"stamps_{b}"] = times.repeat_interleave(
                self.model.settings.temporal_patch_size
            )
        return arrays

    def short_prompt(self, encoded: Encoded, video: PreparedVideo) -> list[int]:
        """The prompt with one placeholder, which vLLM's rule turns into ``prompt_ids`` again; ValueError if not."""
        _, height, width = video.grid
        pad, ids = self.model.video_pad_id, list(encoded.prompt_ids)
        pads = [pad] * (height * width // self.model.settings.merge_size**2)
        stamps = [
            encode_text(self.model.tokenizer, f"<{time:.1f} seconds>")
            for time in video.times
        ]
        shown = [
            i
            for stamp in stamps
            for i in (*stamp, self.vision_start, *pads, self.vision_end)
        ]
        first = ids.index(self.vision_start) - len(stamps[0])
        if ids[first : first + len(shown)] != shown:
            raise ValueError(
                f"the prompt does not show its video as vLLM would, from place {first} on"
            )
        return [
            *ids[:first],
            self.vision_start,
            pad,
            self.vision_end,
            *ids[first + len(shown) :],
        ]

    def _check_stamp(self) -> None:
        tokenizer, before = self.model.tokenizer, self.model.template.before
        parts = [
            encode_text(tokenizer, text)
            for text in (before, "<0.5 seconds>", before + "<0.5 seconds>")
        ]
        if parts[0] + parts[1] != parts[2]:
            raise ValueError(
                "vLLM makes a frame's time stamp tokens of its own, but here a token joins it to the text before it, "
                f"{before[-12:]!r}: the template's `before` should end in a newline"
            )

    def _chains(
        self, found: Mapping[str, Tensor], count: int, copies: int, *, limit: int
    ) -> list[list[PackedCot]]:
        lengths, tokens, finished = (
            found["length"].tolist(),
            found["tokens"],
            found["finished"].tolist(),
        )
        if (
            not len(lengths) == len(finished) == count
            or sum(lengths) != len(tokens)
            or max(lengths, default=0) > limit
        ):
            raise RuntimeError(
                f"{count} chains of at most {limit} tokens were asked for, got lengths {lengths}"
            )
        if len(tokens) and (tokens.min() < 0 or self.banned[tokens].any()):
            bad = sorted(set(tokens[self.banned[tokens]].tolist()))
            raise RuntimeError(f"the engine chose banned ids: {bad[:8]}")
        rows = [
            PackedCot(tuple(row.tolist()), end)
            for row, end in zip(tokens.split(lengths), finished, strict=True)
        ]
        return [rows[i : i + copies] for i in range(0, count, copies)]


def save_stock(model: DeScore, path: Path) -> None:
    """What vLLM loads: a stock Qwen3-VL with tokenizer and processor."""
    config = copy.deepcopy(model.backbone.config)
    config.architectures, config.dtype = (
        [type(model.backbone).__name__],
        model.backbone.dtype,
    )
    config.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    for name, content in processor_files(model.settings).items():
        (path / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    save_weights(model, path)


def save_weights(model: DeScore, path: Path) -> None:
    """model.safetensors, there as a whole or not at all. The model's own ``save_pretrained`` writes on rank 0 only."""
    from safetensors.torch import save_file

    backbone = model.backbone
    weights = merged_backbone(backbone, model.state_dict(), backbone.dtype)
    if backbone.config.tie_word_embeddings:
        del weights["lm_head.weight"]  # stock folders have one of the two
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, path / "next", metadata={"format": "pt"})
    os.replace(path / "next", path / "model.safetensors")


def processor_files(settings: VideoSettings) -> dict[str, dict[str, Any]]:
    """The two files of a Qwen3-VL's processor; vLLM plans its memory by ``size``, frames arrive resized."""
    high = settings.max_pixels * (
        settings.max_frames if settings.budget == "frame" else 1
    )
    shared = {
        "size": {"shortest_edge": settings.min_pixels, "longest_edge": high},
        "patch_size": settings.patch_size,
        "temporal_patch_size": settings.temporal_patch_size,
        "merge_size": settings.merge_size,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "processor_class": "Qwen3VLProcessor",
    }
    return {
        "preprocessor_config.json": {
            **shared,
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        "video_preprocessor_config.json": {
            **shared,
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    }
