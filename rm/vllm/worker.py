"""The other side of `rm.vllm.client`: a vLLM that writes chains of thought. A script for vLLM's own environment.

It is started by that environment's python and imports nothing of this project: only the standard library, torch,
safetensors and vllm. Each line on stdin is one command, each line on stdout its answer, both JSON objects:

    {"command": "start", "model": FOLDER, "options": {...}, "version": N}   -> {"version": N, "vllm": ..., ...}
    {"command": "load", "version": N}                                       -> {"version": N}
    {"command": "write", "version": N, "request": FILE, "reply": FILE, "copies": G, "sampling": {...}}
                                                                            -> {"version": N}
    {"command": "rest"}                                                     -> {"version": null}

``load`` reads the weights in FOLDER again. Arrays are in safetensors files: the request holds, for every sequence b,
short_b (the prompt with one placeholder for the video), full_b (the prompt as it must come out), frames_b (uint8, T Y X
3) and stamps_b (seconds, one a frame), and seeds (of every request, none if greedy) and banned. The reply holds
tokens, length (of every request) and finished. An error ends the process, its traceback is on stderr; so does the end
of stdin.

Interface used, as documented for vLLM 0.11 and later:
    https://docs.vllm.ai/en/latest/features/multimodal_inputs.html    prompt_token_ids, multi_modal_data, ..._uuids
    https://docs.vllm.ai/en/latest/features/sleep_mode.html           sleep, wake_up, collective_rpc("reload_weights")
    https://docs.vllm.ai/en/latest/api/vllm/sampling_params.html      SamplingParams
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from typing import IO, Any

BAN = (
    -100.0
)  # added to the logit of a banned id; the documented range of a bias ends there


class Worker:
    """version  of the weights in the engine; None: it has none, it rests"""

    def __init__(self) -> None:
        self.llm: Any = None
        self.version: int | None = None
        self.sleeps = False
        self.writes = 0

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        command = message.pop("command")
        commands = {
            "start": self.start,
            "load": self.load,
            "write": self.write,
            "rest": self.rest,
        }
        return {**(commands[command](**message) or {}), "version": self.version}

    def start(
        self, model: str, options: dict[str, Any], version: int
    ) -> dict[str, Any]:
        import vllm

        self.sleeps = options["enable_sleep_mode"]
        self.llm = vllm.LLM(model=model, **options)
        self.version = version
        return {
            "vllm": vllm.__version__,
            "transformers": importlib.metadata.version("transformers"),
        }

    def load(self, version: int) -> None:
        resting, self.version = self.version is None, None
        if resting:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights")
        if resting:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()  # what is cached of prompts was computed with the old weights
        self.version = version

    def rest(self) -> None:
        if self.sleeps and self.version is not None:
            self.llm.sleep(
                level=2
            )  # keeps neither the weights, which are about to change, nor the cache
            self.version = None

    def write(
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
            raise RuntimeError(
                f"asked to write with weights {version}, the engine has {self.version}"
            )
        arrays = load_file(request)
        self.writes += 1
        count = sum(name.startswith("short_") for name in arrays)
        prompts = [self.prompt(arrays, b) for b in range(count) for _ in range(copies)]
        bias = dict.fromkeys(arrays["banned"].tolist(), BAN)
        seeds = arrays["seeds"].tolist() if "seeds" in arrays else [None] * len(prompts)
        # every copy is a request of its own: only so has it a seed of its own. They share the prompt's cache
        params = [
            SamplingParams(
                n=1, seed=seed, logit_bias=bias, detokenize=False, **sampling
            )
            for seed in seeds
        ]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        rows: list[list[int]] = []
        finished: list[bool] = []
        for i, output in enumerate(outputs):
            check_prompt(
                list(output.prompt_token_ids), arrays[f"full_{i // copies}"].tolist()
            )
            (completion,) = output.outputs
            if completion.finish_reason not in ("stop", "length"):
                raise RuntimeError(
                    f"request {i} ended with finish_reason={completion.finish_reason!r}"
                )
            tokens = list(completion.token_ids)
            finished.append(completion.finish_reason == "stop")
            if finished[-1] and tokens and tokens[-1] in sampling["stop_token_ids"]:
                tokens.pop()
            rows.append(tokens)
        found = {
            "tokens": torch.tensor(
                [token for row in rows for token in row], dtype=torch.int64
            ),
            "length": torch.tensor([len(row) for row in rows], dtype=torch.int64),
            "finished": torch.tensor(finished, dtype=torch.bool),
        }
        save_file(found, reply)

    def prompt(self, arrays: dict[str, Any], b: int) -> dict[str, Any]:
        """One of vLLM's ``TokensPrompt``. The frames are those the judge sees: no sampling, no resize."""
        frames, stamps = arrays[f"frames_{b}"], arrays[f"stamps_{b}"].tolist()
        metadata = {
            "fps": 1.0,  # so that a frame's index is its time in seconds
            "frames_indices": stamps,
            "total_num_frames": len(stamps),
            "duration": float(len(stamps)),
            "video_backend": "opencv",
            "do_sample_frames": False,
        }
        return {
            "prompt_token_ids": arrays[f"short_{b}"].tolist(),
            "multi_modal_data": {"video": [(frames.numpy(), metadata)]},
            "mm_processor_kwargs": {"do_sample_frames": False, "do_resize": False},
            # a name used once: the engine must not take an old vision tower's features from its caches
            "multi_modal_uuids": {"video": [f"{self.writes}-{b}"]},
        }


def check_prompt(found: list[int], wanted: list[int]) -> None:
    """The sequence that was continued is the one all other stages read."""
    if found != wanted:
        pairs = zip(found, wanted, strict=False)
        place = next(
            (i for i, (x, y) in enumerate(pairs) if x != y),
            min(len(found), len(wanted)),
        )
        raise ValueError(
            f"vLLM's prompt has {len(found)} tokens and ours {len(wanted)}; from place {place} it reads "
            f"{found[place : place + 8]} instead of {wanted[place : place + 8]}"
        )


def serve(commands: IO[bytes], replies: IO[bytes]) -> None:
    worker = Worker()
    for line in commands:
        replies.write(json.dumps(worker.answer(json.loads(line))).encode() + b"\n")
        replies.flush()


def main() -> None:
    # engines log to stdout: the pipes become ours alone, under other numbers, before anything can be imported
    commands, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    serve(commands, replies)


if __name__ == "__main__":
    main()
