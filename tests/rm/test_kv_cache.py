"""The decode loop on preallocated buffers against one on transformers' DynamicCache."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.bench.rm_decode import write_with_dynamic_cache
from rm.config import Generation
from rm.cuda_graph import CapturedFunction
from rm.generate import GeneratedCots, extend, generate, rewards_from_cache
from rm.kv_cache import KvCache
from rm.model import Batch, DeScore
from rm.packed import PackedCot
from rm.video import prepare
from tests.rm.test_generate import PROMPTS, judge
from tests.tiny_qwen import SETTINGS, random_frames, speak_plainly

# Kernels after which the host waits for a device, and copies from the host to it.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")
COPIES = ("lift_fresh",)


@pytest.fixture(scope="module")
def model() -> DeScore:
    return judge()


@pytest.fixture(scope="module")
def speaker() -> DeScore:
    """The same weights; its CoTs end by themselves, at different lengths."""
    model = judge()
    speak_plainly(model.backbone)
    return model


def batch_of(model: DeScore, rows: Sequence[int]) -> Batch:
    videos = [
        prepare(random_frames(row, frames=4 + row), SETTINGS, fps=4.0) for row in rows
    ]
    encoded = [
        model.encode(PROMPTS[row], video)
        for row, video in zip(rows, videos, strict=True)
    ]
    return model.batch(encoded, videos, query=False)


def sampled(limit: int, penalty: float = 1.0, temperature: float = 1.0) -> Generation:
    return Generation(
        max_new_tokens=limit, temperature=temperature, repetition_penalty=penalty
    )


def cots_of(cots: GeneratedCots) -> list[PackedCot]:
    return [cots.cot(row) for row in range(len(cots.token_BL))]


@pytest.mark.parametrize("rows", [[0], [1, 2], [0, 0, 0], [0, 1, 2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize(
    "how",
    [
        sampled(40, temperature=0.0),
        sampled(40, temperature=0.0, penalty=1.05),
        sampled(40, temperature=2.0),
        sampled(40, temperature=1.0, penalty=1.3),
    ],
    ids=["greedy", "greedy-penalty", "sampled", "sampled-penalty"],
)
def test_tokens_are_those_of_a_dynamic_cache(
    speaker, monkeypatch, rows, copies, how
) -> None:
    # Buffers that grow several times on the way.
    monkeypatch.setattr("rm.kv_cache.BLOCK", 8)
    batch = batch_of(speaker, rows)
    seeds = range(len(rows) * copies) if how.temperature > 0 else None
    want = write_with_dynamic_cache(speaker, batch, how, seeds, copies)
    if how.temperature == 2.0 and len(rows) == 6:
        assert len({len(cot.ids) for cot in want}) > 2
    cots = generate(speaker, batch, how, seeds=seeds, copies=copies)
    assert cots_of(cots) == want


def test_tokens_are_those_of_a_dynamic_cache_in_a_long_cot(model) -> None:
    """Longer than a block of the buffers."""
    batch = batch_of(model, [0, 3])
    how = sampled(300)
    want = write_with_dynamic_cache(model, batch, how, [7, 8], 1)
    assert cots_of(generate(model, batch, how, seeds=[7, 8])) == want


def test_token_copies_no_slots_within_a_block() -> None:
    keys = torch.zeros(2, 3, 8, 4)
    cache = KvCache([keys], [keys.clone()], used=5)
    new = torch.arange(24.0).reshape(2, 3, 1, 4)
    seen, _ = cache.update(new, new, 0)
    assert seen.shape == (2, 3, 6, 4)
    assert seen.data_ptr() == keys.data_ptr()
    assert torch.equal(keys[:, :, 5:6], new)
    cache.advance(1)
    assert not cache.reserve(2)
    # 9 slots do not fit into 8: the buffers move, and their content with them.
    # Two buffers of 2 x 3 x 4 numbers of 4 bytes, 248 slots more.
    assert cache.bytes_to_reserve(2) == 0
    assert cache.bytes_to_reserve(3) == 2 * 2 * 3 * 4 * 4 * 248
    assert cache.reserve(3)
    assert cache.slots == 256
    assert torch.equal(cache.keys[0][:, :, :6], keys[:, :, :6])
    assert cache.keys[0][:, :, 6:].abs().sum() == 0


class Replayed:
    """Stands for a CUDA graph on a CPU: runs the step on the whole buffers."""

    made: list[Replayed]

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function
        self.calls = 0
        self.resets = 0
        Replayed.made.append(self)

    def reset(self) -> None:
        self.resets += 1

    def __call__(self) -> None:
        self.calls += 1
        self.function()


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_whole_buffers_behind_a_mask_give_the_same_tokens(
    speaker, monkeypatch, temperature
) -> None:
    """What a CUDA graph replays: attention over all slots, places read on the device."""
    how = sampled(40, temperature=temperature, penalty=1.05)
    seeds = range(12) if temperature else None
    batch = batch_of(speaker, range(6))
    plain = generate(speaker, batch, how, seeds=seeds, copies=2)
    rewards = rewards_from_cache(speaker, plain)
    monkeypatch.setattr(Replayed, "made", [], raising=False)
    monkeypatch.setattr("rm.kv_cache.BLOCK", 16)
    monkeypatch.setattr("rm.generate.can_capture", lambda model: True)
    monkeypatch.setattr("rm.generate.CapturedFunction", Replayed)
    monkeypatch.setattr("rm.generate.steps_between_looks", lambda device: 16)
    cots = generate(speaker, batch, how, seeds=seeds, copies=2)
    assert cots_of(cots) == cots_of(plain)
    # Attention over more slots adds zeros in another order.
    torch.testing.assert_close(
        rewards_from_cache(speaker, cots), rewards, atol=1e-5, rtol=0
    )
    # A graph whose buffers have moved is captured again.
    (graph,) = Replayed.made
    used = batch.ids_BL.shape[1]
    blocks = math.ceil((used + graph.calls) / 16) - math.ceil((used + 1) / 16)
    assert graph.resets == blocks >= 2


def test_looking_every_16_tokens_changes_nothing(speaker, monkeypatch) -> None:
    """The tokens after the last end are dropped, from the cache too."""
    batch = batch_of(speaker, range(6))
    how = sampled(100, temperature=2.0)
    plain = generate(speaker, batch, how, seeds=range(6))
    longest = int(plain.length_B.max())
    assert plain.finished_B.all()
    assert longest % 16
    monkeypatch.setattr("rm.generate.steps_between_looks", lambda device: 16)
    fed = []
    language_model = speaker.backbone.model.language_model
    with language_model.register_forward_pre_hook(lambda *_: fed.append(1)):
        seldom = generate(speaker, batch, how, seeds=range(6))
    # The prompt, and tokens up to the look after the last end.
    assert len(fed) == 1 + longest // 16 * 16 + 15
    assert cots_of(seldom) == cots_of(plain)
    assert torch.equal(seldom.mask_BK, plain.mask_BK)
    assert torch.equal(seldom.position_B, plain.position_B)
    want = rewards_from_cache(speaker, plain)
    assert torch.equal(rewards_from_cache(speaker, seldom), want)


def test_extension_of_rows_looked_at_seldom_changes_nothing(
    speaker, monkeypatch
) -> None:
    batch = batch_of(speaker, range(6))
    seeds = list(range(6))
    whole = generate(speaker, batch, sampled(40, temperature=2.0), seeds=seeds)
    monkeypatch.setattr("rm.generate.steps_between_looks", lambda device: 16)
    cut = generate(speaker, batch, sampled(5, temperature=2.0), seeds=seeds)
    rows = (~cut.finished_B).nonzero().squeeze(1).tolist()
    longer = extend(
        speaker,
        cut,
        rows,
        sampled(40, temperature=2.0),
        seeds=[seeds[row] for row in rows],
    )
    assert cots_of(longer) == [cots_of(whole)[row] for row in rows]


class Calls(TorchDispatchMode):
    """Counts the kernels that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_token_waits_for_no_device(model, monkeypatch, temperature) -> None:
    """48 more tokens cost three looks whether all rows have ended, and no copy."""
    monkeypatch.setattr("rm.generate.steps_between_looks", lambda device: 16)
    batch = batch_of(model, [0, 1, 2])
    seeds = range(3) if temperature else None
    counts = []
    for limit in (32, 80):
        how = sampled(limit, temperature=temperature, penalty=1.05)
        with Calls() as calls:
            cots = generate(model, batch, how, seeds=seeds)
        assert not cots.finished_B.any()
        waits = sum(calls.count[name] for name in WAITS)
        copies = sum(calls.count[name] for name in COPIES)
        counts.append((waits, copies))
    assert counts[1][0] - counts[0][0] == 3
    assert counts[1][1] == counts[0][1]


# ------------------------------------------------------------------ the graph


class FakeGraph:
    """torch.cuda's graph: keeps what is called while it captures, runs it at replay."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def replay(self) -> None:
        self.log.append("replay")


class FakeStream:
    def wait_stream(self, stream: object) -> None: ...


class Entered:
    def __init__(self, log: list[str], word: str) -> None:
        self.log = log
        self.word = word

    def __enter__(self) -> None:
        self.log.append(self.word)

    def __exit__(self, *_: object) -> None:
        self.log.append(f"end of {self.word}")


def test_function_runs_once_then_is_captured_then_replayed(monkeypatch) -> None:
    log: list[str] = []
    options = []

    def capture(graph: object, **given: object) -> Entered:
        options.append(given)
        return Entered(log, "capture")

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: Entered(log, "stream"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(log))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    step = CapturedFunction(lambda: log.append("run"))
    plain = ["stream", "run", "end of stream"]
    captured = ["capture", "run", "end of capture", "replay"]
    for _ in range(3):
        step()
    assert log == [*plain, *captured, "replay"]
    # Buffers that moved: captured again, in the same memory.
    step.reset()
    step()
    assert log == [*plain, *captured, "replay", *captured]
    assert [given["pool"] for given in options] == ["pool", "pool"]
    assert {given["capture_error_mode"] for given in options} == {"thread_local"}
