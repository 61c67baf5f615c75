"""Generate chains of thought with vLLM, in a process and a Python environment of its own.

vLLM's pins clash with ours, so `rm/vllm/worker.py` runs under another interpreter and answers
lines of JSON (`common.line_process`); frames, prompts and tokens are safetensors files in a
private temporary folder. What vLLM loads is a stock Qwen3-VL (`rm.vllm.weights`): LoRA merged, our
tokenizer, and processor settings that treat frames as `rm.video` does.

`make vllm-check` compares all this with a real vLLM; tests/fakes_vllm is a stand-in for the tests.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import load_tensors, save_tensors
from common.line_process import LineProcess, LineProcessError, foreign_environment
from common.log import say
from rm.config import Generation, VllmConfig
from rm.model import DeScore
from rm.packed import PackedCot
from rm.prompt import Encoded
from rm.video import PreparedVideo
from rm.vllm.request import check_model, request_arrays
from rm.vllm.weights import CheckpointWeights, TrainedWeights, private_folder

SCRIPT = Path(__file__).with_name("worker.py")
# The releases that `make vllm-check` has passed with: from the first, below the second.
SUPPORTED = ((0, 32), (0, 33))
GIB = 1024**3


class VllmBackend:
    """Implements `rm.cot_backend.CotBackend` with vLLM.

    checkpoint  The folder of a model that is never trained. None: the weights are those that the
                model has at each `sync`, and all ranks make, sync and close one together.

    The process starts with the object, vLLM in it at the first `sync`. Raises ValueError or
    FileNotFoundError for a model, an interpreter or a release of vLLM that do not suit it, and
    LineProcessError, with the end of the process's stderr, when the process dies, times out or
    breaks the protocol.
    """

    def __init__(
        self, cfg: VllmConfig, model: DeScore, *, checkpoint: Path | None = None
    ) -> None:
        if shutil.which(cfg.python) is None:
            raise FileNotFoundError(
                f"vllm.python={cfg.python}: there is no such interpreter"
            )
        check_model(model)
        self.cfg = cfg
        self.model = model
        self.banned = model.banned_ids()
        # The version of the weights that vLLM holds; None while it holds none.
        self.version: int | None = None
        self.started = False
        self.sleeps = cfg.sleep
        self.bare_placeholder = True

        # Another release may read prompts otherwise: it is refused before anything is loaded.
        self.folder = private_folder(self, cfg.folder)
        self.process = LineProcess(
            # -P keeps the script's folder off the worker's import path.
            [cfg.python, "-P", str(SCRIPT)],
            stderr=self.folder / "stderr.txt",
            env=self._environment(),
            grace_s=60.0,
        )
        check_release(cfg.python, self._ask("hello"))
        if checkpoint is None:
            self.weights = TrainedWeights(model, cfg.folder)
        else:
            self.weights = CheckpointWeights(model, checkpoint, cfg.folder)

    def sync(self, version: int) -> None:
        """Give vLLM the model's present weights, under the name ``version``."""
        if version == self.version:
            return
        asleep = self.version is None
        self.version = None
        # What PyTorch keeps for later would be missing when vLLM takes its memory.
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self.started:
            self.weights.hand_over(lambda: self._start(version))
        elif self.weights.reload:
            self.weights.hand_over(
                lambda: self._ask("load", version=version, reload=True)
            )
        else:
            assert asleep, "a frozen model has a single version"
            self._ask("load", version=version, reload=False)
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

        # 1. Send the request.
        request = self.folder / "request.safetensors"
        reply = self.folder / "reply.safetensors"
        arrays = request_arrays(self.model, encoded, videos, bare=self.bare_placeholder)
        arrays["banned"] = self.banned.nonzero().squeeze(1)
        if seeds is not None:
            arrays["seeds"] = torch.tensor(list(seeds))
        save_tensors(request, arrays)
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

        # 2. Check and split the tokens.
        tokens = arrays["tokens"]
        banned = tokens[self.banned[tokens]]
        if len(banned):
            raise RuntimeError(f"vLLM chose banned ids: {banned.unique().tolist()[:8]}")
        cots = []
        rows = tokens.split(arrays["length"].tolist())
        for row, finished in zip(rows, arrays["finished"].tolist(), strict=True):
            cots.append(PackedCot(tuple(row.tolist()), finished))
        return [cots[i : i + copies] for i in range(0, len(cots), copies)]

    def rest(self) -> None:
        """Free vLLM's memory until the next `sync`, where the platform can."""
        if self.sleeps and self.version is not None:
            self.version = None
            self._ask("rest", level=self.weights.sleep_level)

    def close(self) -> None:
        """End the process; the private folders are deleted with the object."""
        self.version = None
        self.process.end()

    # ------------------------------------------------------------------ the process

    def _start(self, version: int) -> None:
        options = {
            "dtype": str(self.model.backbone.dtype).removeprefix("torch."),
            "max_model_len": self.cfg.max_model_len,
            "limit_mm_per_prompt": {"image": 0, "video": 1},
            "enable_sleep_mode": self.cfg.sleep,
            # No sampling settings but those of the request.
            "generation_config": "vllm",
            "seed": 0,
            **self._memory(),
            **self.cfg.engine_args,
        }
        folder = str(self.weights.folder)
        reply = self._ask("start", model=folder, options=options, version=version)
        self.started = True
        self.bare_placeholder = reply["bare_placeholder"]
        if self.sleeps and not reply["can_sleep"]:
            self.sleeps = False
            say("vLLM cannot sleep on this platform: it keeps its memory all the time")

    def _memory(self) -> dict[str, Any]:
        """Return vLLM's options of memory: what is free now, if nothing else is set."""
        device = self.model.device
        if self.cfg.gpu_memory is not None:
            return {"gpu_memory_utilization": self.cfg.gpu_memory}
        if device.type != "cuda":
            return {"kv_cache_memory_bytes": GIB}
        free, total = torch.cuda.mem_get_info(device)
        weights = sum(p.nbytes for p in self.model.backbone.parameters())
        share = memory_share(
            free, total, weights=weights, reserve=int(self.cfg.reserve_gb * GIB)
        )
        return {"gpu_memory_utilization": share}

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
                f"vllm.max_model_len={self.cfg.max_model_len}"
            )


def memory_share(free: int, total: int, *, weights: int, reserve: int) -> float:
    """Return the share of a GPU's memory that vLLM may take, rounded down to a thousandth.

        share = (free - reserve) / total        all in bytes

    Raises ValueError if the weights alone do not fit in.
    """
    room = free - reserve
    if room < weights:
        raise ValueError(
            f"vLLM needs {weights / GIB:.1f} GiB for its weights, but {free / GIB:.1f} of "
            f"{total / GIB:.1f} GiB are free, of which vllm.reserve_gb keeps "
            f"{reserve / GIB:.1f}"
        )
    return room * 1_000 // total / 1_000


def check_release(python: str, versions: dict[str, Any]) -> None:
    """Raise ValueError if an environment has no vLLM, or a release that is not supported."""
    lowest, limit = (".".join(map(str, release)) for release in SUPPORTED)
    wanted = f"install vllm>={lowest},<{limit} in that environment"
    found = versions["vllm"]
    if found is None:
        raise ValueError(f"vllm.python={python} has no vLLM: {wanted}")
    # Release candidates and builds have letters behind: 0.32.1rc2, 0.32.0+cpu.
    numbers = re.match(r"(\d+)\.(\d+)", found)
    release = tuple(map(int, numbers.groups())) if numbers else (0, 0)
    if not SUPPORTED[0] <= release < SUPPORTED[1]:
        raise ValueError(
            f"vllm.python={python} has vLLM {found}, which is not supported: {wanted}"
        )
