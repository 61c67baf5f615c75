"""A stand-in for vLLM 0.32 with the calls that `rm/vllm/worker.py` makes.

It runs the folder's stock Qwen3-VL with a full forward a token. Unknown arguments are errors. Its
caches persist as in vLLM, so that a missing reset shows. The variable FAKE_VLLM breaks it. The
checks of `experiments/vllm_check.py` hold for it and for the real one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from vllm import platforms

FAULT = os.environ.get("FAKE_VLLM", "")
AT_ONCE = (
    "die",
    "hang",
    "dies and leaves a child",
)  # before there is a model, which takes seconds to load
VISION = ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>")


@dataclasses.dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logit_bias: dict[int, float] | None = None
    detokenize: bool = True


@dataclasses.dataclass
class CompletionOutput:
    token_ids: list[int]
    finish_reason: str


@dataclasses.dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        max_model_len: int,
        gpu_memory_utilization: float = 0.92,
        kv_cache_memory_bytes: int | None = None,
        limit_mm_per_prompt: dict[str, int],
        enable_sleep_mode: bool,
        generation_config: str,
        seed: int,
        enforce_eager: bool = False,
    ) -> None:
        sys.stdout.write("INFO the engine talks on stdout while it starts\n")
        os.write(1, b"and so do its libraries\n")
        assert generation_config == "vllm"
        assert limit_mm_per_prompt == {"image": 0, "video": 1}
        assert 0 < gpu_memory_utilization <= 1
        if (
            enable_sleep_mode
            and not platforms.current_platform.is_sleep_mode_available()
        ):
            raise ValueError("Sleep mode is not supported on current platform.")
        if FAULT == "no memory":
            raise ValueError("No available memory for the cache blocks")
        self.memory = (gpu_memory_utilization, kv_cache_memory_bytes)
        self.folder, self.dtype, self.max_model_len = model, dtype, max_model_len
        self.sleep_mode, self.asleep = enable_sleep_mode, set()
        if FAULT in AT_ONCE:
            return
        from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

        self.model = Qwen3VLForConditionalGeneration.from_pretrained(
            model, dtype=dtype
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.processor = json.loads(
            (Path(model) / "video_preprocessor_config.json").read_text()
        )
        self.weights = 0  # how often they changed
        self.prefixes: dict[tuple, torch.Tensor] = {}  # logits after a prompt
        self.videos: dict[
            str, tuple[int, bytes]
        ] = {}  # uuid -> weights that encoded it, and what it was

    # -------------------------------------------------------------- weights and memory

    def collective_rpc(self, method: str) -> list[None]:
        assert method == "reload_weights"
        assert "weights" not in self.asleep
        if FAULT == "stale":
            return [None]
        fresh = type(self.model).from_pretrained(self.folder, dtype=self.dtype)
        self.model.load_state_dict(fresh.state_dict())
        self.weights += 1
        return [None]

    def reset_prefix_cache(self) -> bool:
        self.prefixes.clear()
        return True

    def sleep(self, level: int = 1) -> None:
        assert self.sleep_mode
        self.asleep = {"weights", "kv_cache"}
        self.prefixes.clear()
        if level == 1:
            return
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()

    def wake_up(self, tags: list[str] | None = None) -> None:
        assert self.sleep_mode
        self.asleep -= set(tags or ("weights", "kv_cache"))

    # -------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(
        self,
        prompts: list[dict],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        assert not self.asleep
        assert not use_tqdm
        assert len(prompts) == len(sampling_params)
        sys.stdout.write("INFO it talks on stdout while it writes\n")
        if FAULT == "die":
            sys.stderr.write("CUDA error: an illegal memory access was encountered\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "hang":
            time.sleep(3600)
        if FAULT == "dies and leaves a child":
            if os.fork() == 0:  # it holds all pipes open
                time.sleep(3600)
            os._exit(3)
        return [
            self._one(prompt, how)
            for prompt, how in zip(prompts, sampling_params, strict=True)
        ]

    def _one(self, prompt: dict, how: SamplingParams) -> RequestOutput:
        assert set(prompt) == {
            "prompt_token_ids",
            "multi_modal_data",
            "mm_processor_kwargs",
            "multi_modal_uuids",
        }
        assert prompt["mm_processor_kwargs"] == {
            "do_sample_frames": False,
            "do_resize": False,
        }
        assert (how.n, how.top_p, how.top_k, how.ignore_eos) == (1, 1.0, -1, True)
        ((frames, metadata),) = prompt["multi_modal_data"]["video"]
        (uuid,) = prompt["multi_modal_uuids"]["video"]
        encoded = self.videos.setdefault(uuid, (self.weights, frames.tobytes()))
        assert encoded == (self.weights, frames.tobytes()), (
            "the encoder cache would answer with something old"
        )
        patches, grid = self._patches(frames)
        ids = self._expand(prompt["prompt_token_ids"], metadata, grid)
        assert len(ids) + how.max_tokens <= self.max_model_len
        tokens, reason = self._continue(ids, patches, grid, how)
        reported = [*ids[:-1], 0] if FAULT == "another prompt" else ids
        return RequestOutput(reported, [CompletionOutput(tokens, reason)])

    def _continue(
        self,
        ids: list[int],
        patches: torch.Tensor,
        grid: torch.Tensor,
        how: SamplingParams,
    ) -> tuple:
        draw = torch.Generator().manual_seed(how.seed) if how.seed is not None else None
        key = (*ids, patches.sum().item())
        tokens: list[int] = []
        for step in range(how.max_tokens):
            if step > 0:
                logits = self._logits([*ids, *tokens], patches, grid)
            else:
                if key not in self.prefixes:
                    self.prefixes[key] = self._logits(ids, patches, grid)
                logits = self.prefixes[key].clone()
            seen = torch.tensor(sorted({*ids, *tokens}))
            positive = logits[seen] > 0
            penalty = how.repetition_penalty
            logits[seen] = torch.where(
                positive, logits[seen] / penalty, logits[seen] * penalty
            )
            for token, bias in (how.logit_bias or {}).items():
                logits[token] += 0.0 if FAULT == "no bias" else bias
            if how.temperature == 0:
                token = int(logits.argmax())
            else:
                probabilities = (logits.double() / how.temperature).softmax(-1)
                token = int(torch.multinomial(probabilities, 1, generator=draw))
            tokens.append(token)
            if token in (how.stop_token_ids or ()):
                return tokens, "stop"
        return tokens, "length"

    def _logits(
        self, ids: list[int], patches: torch.Tensor, grid: torch.Tensor
    ) -> torch.Tensor:
        ids_1L = torch.tensor([ids])
        types_1L = (ids_1L == self.model.config.video_token_id).int() * 2
        positions, _ = self.model.model.get_rope_index(
            ids_1L, types_1L, video_grid_thw=grid
        )
        output = self.model(
            input_ids=ids_1L,
            position_ids=positions,
            pixel_values_videos=patches,
            video_grid_thw=grid,
            mm_token_type_ids=types_1L,
            use_cache=False,
        )
        return output.logits[0, -1].float()

    # -------------------------------------------------------------- its Qwen3-VL processor

    def _patches(self, frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        own = self.processor
        p, m, tp = own["patch_size"], own["merge_size"], own["temporal_patch_size"]
        assert frames.dtype == np.uint8
        mean, std = np.array(own["image_mean"]), np.array(own["image_std"])
        video = (
            ((frames / 255.0 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
        )  # T C Y X
        rows = []
        t, h, w = frames.shape[0] // tp, frames.shape[1] // p, frames.shape[2] // p
        for f in range(t):
            for block_y in range(h // m):
                for block_x in range(w // m):
                    for y in range(block_y * m, block_y * m + m):
                        for x in range(block_x * m, block_x * m + m):
                            cut = video[
                                f * tp : f * tp + tp,
                                :,
                                y * p : y * p + p,
                                x * p : x * p + p,
                            ]
                            rows.append(cut.transpose(1, 0, 2, 3).reshape(-1))
        return torch.from_numpy(np.stack(rows)), torch.tensor([[t, h, w]])

    def _expand(self, ids: list[int], metadata: dict, grid: torch.Tensor) -> list[int]:
        """Expand the placeholder to a time stamp, vision start, pads and vision end per patch.

        Processors of transformers 5.10 and later replace the video token alone, and keep vision
        tokens around it; older ones replace all three.
        """
        start, pad, end = self.tokenizer.convert_tokens_to_ids(list(VISION))
        target = [pad] if bare_placeholder() else [start, pad, end]
        size = len(target)
        places = [i for i in range(len(ids) - size + 1) if ids[i : i + size] == target]
        assert len(places) == 1, (
            "Failed to apply prompt replacement for mm_items['video'][0]"
        )
        assert set(metadata) == {
            "fps",
            "frames_indices",
            "total_num_frames",
            "duration",
            "video_backend",
            "do_sample_frames",
        }
        assert metadata["do_sample_frames"] is False
        merge = self.processor["merge_size"]
        seconds = [index / metadata["fps"] for index in metadata["frames_indices"]]
        times = [
            (seconds[i] + seconds[i + merge - 1]) / 2
            for i in range(0, len(seconds), merge)
        ]
        t, h, w = grid[0].tolist()
        assert len(times) == t, (
            "The timestamps length should be equal to the video length"
        )
        shown = []
        for time_ in times:
            stamp = self.tokenizer.encode(
                f"<{time_:.1f} seconds>", add_special_tokens=False
            )
            shown += [*stamp, start, *[pad] * (h * w // merge**2), end]
        return [*ids[: places[0]], *shown, *ids[places[0] + size :]]


def bare_placeholder() -> bool:
    """As `vllm.model_executor.models.qwen3_vl._expands_only_video_token`."""
    from transformers import ProcessorMixin, Qwen3VLProcessor

    general = getattr(ProcessorMixin, "replace_video_token", None)
    special = getattr(Qwen3VLProcessor, "replace_video_token", None)
    return special is not None and special is not general
