"""VllmBackend with a stand-in for vLLM (tests/fakes_vllm) in a real worker process."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.line_process import LineProcessError
from common.video_io import write_mp4
from rm.config import (
    BackboneLora,
    CotBackendConfig,
    DualRlConfig,
    Generation,
    LearningRates,
    VideoSettings,
)
from rm.cot_backend import HfBackend
from rm.data import Pair, PairSchedule
from rm.dual_rl import DualRl, backwards_per_update
from rm.model import DeScore
from rm.prompt import CONTROL_TOKENS, PromptTemplate
from rm.text_rewards import RuleRewardConfig
from rm.video import prepare
from rm.vllm.client import VllmBackend, save_stock
from tests.rm.test_cold_start import PlainEngine
from tests.tiny_qwen import SETTINGS, TEMPLATE, random_frames, tiny_qwen, tiny_tokenizer

FAKE = Path(__file__).parents[2] / "fakes_vllm"
GREEDY = Generation(max_new_tokens=10, repetition_penalty=1.0)
PENALISED = Generation(max_new_tokens=10, repetition_penalty=1.3)
SAMPLED = Generation(max_new_tokens=10, temperature=1.0, repetition_penalty=1.0)
PROMPTS = ["a", "a red ball moves left", "two cats", "x" * 20]
BANNED = {*range(264, 320)}


def talker() -> DeScore:
    """A model that writes eight letters and ends, and whose banned ids have higher logits."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        backbone, tokenizer = tiny_qwen(tied=False), tiny_tokenizer()
        words = [*tokenizer.encode("abcdefgh"), tokenizer.eos_token_id]
        weight = backbone.lm_head.weight
        rows = torch.randn(
            len(words), weight.shape[1], generator=torch.Generator().manual_seed(5)
        )
        weight.zero_()
        weight[words] = rows
        weight[264:] = 5.0 * rows.repeat(7, 1)[:56]
        weight[backbone.config.image_token_id] = 6.0 * rows[0]
        return DeScore(backbone, tokenizer, TEMPLATE, SETTINGS, query_id=264).eval()


def config(fault: str = "", **changes) -> CotBackendConfig:
    options = {
        "kind": "vllm",
        "python": sys.executable,
        "max_model_len": 1024,
        "timeout_s": 120.0,
        **changes,
    }
    return CotBackendConfig(
        **options, env={"PYTHONPATH": str(FAKE), "FAKE_VLLM": fault}
    )


@pytest.fixture(scope="module")
def model():
    return talker()


@pytest.fixture(scope="module")
def videos():
    # At 11 fps times such as 4 / 11 are inexact; three frames leave a patch to fill.
    return [
        prepare(random_frames(i, frames=3 + i), SETTINGS, fps=11.0) for i in range(4)
    ]


@pytest.fixture(scope="module")
def encoded(model, videos):
    return [
        model.encode(prompt, video)
        for prompt, video in zip(PROMPTS, videos, strict=True)
    ]


@pytest.fixture(scope="module")
def writer(model):
    writer = VllmBackend(config(), model)
    writer.sync(0)
    yield writer
    writer.close()


def test_greedy_cot_equals_hf_backend(model, writer, encoded, videos):
    for how in (GREEDY, PENALISED):
        want = HfBackend(model, batch=4).write(
            encoded, videos, how, version=0, copies=2
        )
        found = writer.write(encoded, videos, how, version=0, copies=2)
        assert found == want
    assert len({group[0].ids for group in found}) > 1  # otherwise no order was compared
    assert {chain.finished for group in want for chain in group} == {True, False}


def test_short_prompt_has_one_placeholder(model, writer, encoded, videos):
    short = writer.short_prompt(encoded[3], videos[3])
    assert short.count(model.video_pad_id) == 1
    assert len(short) < len(encoded[3].prompt_ids)
    with pytest.raises(ValueError, match="vLLM"):
        writer.short_prompt(
            encoded[3], prepare(random_frames(3, frames=7), SETTINGS, fps=4.0)
        )  # other times


def test_sampled_cot_depends_on_its_seed_only(writer, encoded, videos):
    seeds = [11, 12, 13, 2**63 - 1, 15, 16]
    both = writer.write(
        encoded[1:3], videos[1:3], SAMPLED, version=0, seeds=seeds, copies=3
    )
    again = writer.write(
        encoded[1:3], videos[1:3], SAMPLED, version=0, seeds=seeds, copies=3
    )
    assert both == again
    assert len({chain.ids for group in both for chain in group}) > 3
    for copy in range(3):
        own = writer.write(
            encoded[1:3],
            videos[1:3],
            SAMPLED,
            version=0,
            seeds=seeds[copy::3],
            copies=1,
        )
        assert [group[0] for group in own] == [group[copy] for group in both]


def test_banned_ids_are_never_generated(model, writer, encoded, videos):
    chains = writer.write(
        encoded, videos, SAMPLED, version=0, seeds=range(40), copies=10
    )
    found = {token for group in chains for chain in group for token in chain.ids}
    assert not found & {
        *BANNED,
        model.video_pad_id,
        model.backbone.config.image_token_id,
        model.end_id,
    }
    assert len(found) > 4
    with torch.no_grad():
        batch = model.batch(encoded, videos, query=False)
        logits_BV = model.backbone.lm_head(
            model.hidden(batch)[torch.arange(4), batch.last_B]
        )
    assert model.banned_ids()[
        logits_BV.argmax(-1)
    ].any()  # the model itself would have said it


@pytest.mark.parametrize("tied", [True, False])
def test_save_stock_writes_merged_weights(tmp_path, tied):
    judge = DeScore(
        tiny_qwen(tied=tied), tiny_tokenizer(), TEMPLATE, SETTINGS, query_id=264
    )
    judge.param_groups(
        LearningRates(),
        lora=BackboneLora(rank=2, alpha=4.0, dropout=0.0),
        weight_decay=0.0,
    )
    with torch.no_grad():
        for name, parameter in judge.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    judge.save(tmp_path / "checkpoint")
    save_stock(judge, tmp_path / "stock")
    ours, theirs = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("stock", "checkpoint")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (
        json.loads((tmp_path / name / "config.json").read_text())
        for name in ("stock", "checkpoint")
    )
    assert ours == theirs
    assert ours["architectures"] == ["Qwen3VLForConditionalGeneration"]
    assert not (tmp_path / "stock" / "next").exists()


def test_write_with_stale_weights_raises(writer, encoded, videos):
    with pytest.raises(
        RuntimeError,
        match="stale",
    ):
        writer.write(encoded, videos, GREEDY, version=1)


def test_write_with_wrong_seeds_or_length_raises(writer, encoded, videos):
    for options in ({"seeds": [1]}, {"seeds": [1] * 5, "copies": 2}):
        with pytest.raises(ValueError, match="4"):
            writer.write(encoded, videos, SAMPLED, version=0, **options)
    with pytest.raises(ValueError, match="temperature"):
        writer.write(encoded, videos, GREEDY, version=0, seeds=[1] * 4)
    with pytest.raises(ValueError, match="max_model_len=1024"):
        writer.write(encoded, videos, Generation(max_new_tokens=1000), version=0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("pairs"), []
    for i, label in enumerate((1, -1)):
        files = [folder / f"{i}{side}.mp4" for side in "AB"]
        for side, file in enumerate(files):
            write_mp4(file, random_frames(10 * i + side), 4.0)
        found.append(
            Pair(f"prompt {i}", *files, "", "", label, {"subject": 2}, {"subject": 0})
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sleep", [True, False])
def test_dual_rl_generates_with_synced_weights(pairs, encoded, videos, sleep):
    model = talker()
    cfg = DualRlConfig(
        pairs_per_step=2, pairs_per_update=2, micro_batch=1, group_size=2, max_new_tokens=8,
        kl_weight=0.1, bt_weight=0.5, weight_decay=0.0,
    )  # fmt: skip
    rates = LearningRates(llm=3e-2, vision=1e-2, merger=1e-2, query=1e-3, head=1e-2)
    groups = model.param_groups(
        rates, lora=BackboneLora(rank=4, alpha=8.0, dropout=0.0), weight_decay=0.0
    )
    engine = PlainEngine(groups, backwards_per_update(cfg, 1))
    schedule = PairSchedule(2, pairs_per_step=2, seed=0)
    writer = VllmBackend(config(sleep=sleep), model)
    rules = RuleRewardConfig(length_low=0, length_high=8)
    loop = DualRl(
        cfg, rules=rules, model=model, engine=engine, pairs=pairs, schedule=schedule, seed=0,
        writer=writer,
    )  # fmt: skip
    before = HfBackend(model, batch=4).write(encoded, videos, GREEDY, version=0)
    assert loop.version == 0
    first = loop.step(0)
    assert first["train/ratio_mean"] == 1.0  # old log-probs are the trained model's own
    assert loop.version == 1
    with pytest.raises(RuntimeError, match="stale"):
        writer.write(encoded, videos, GREEDY, version=loop.version)
    for version in (1, 2):
        if version == 2:
            loop.step(1)
        writer.sync(version)
        after = HfBackend(model.eval(), batch=4).write(
            encoded, videos, GREEDY, version=version
        )
        assert after != before
        assert writer.write(encoded, videos, GREEDY, version=version) == after
        before = after
    process, folder = writer.process.process, writer.folder
    assert folder.stat().st_mode & 0o077 == 0  # weights and videos are private
    assert not list(folder.glob("re*.safetensors"))  # requests and replies are not kept
    writer.close()
    writer.close()
    assert process.returncode == 0  # it ended by itself, and its exit code was taken
    assert not folder.exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("die", r"(?s)-9.*illegal"),
        pytest.param("dies and leaves a child", "3", marks=pytest.mark.slow),
        pytest.param("hang", "timed out|3 s", marks=pytest.mark.slow),
    ],
)
def test_lost_worker_raises_soon(model, encoded, videos, fault, message):
    writer = VllmBackend(config(fault), model)
    writer.sync(0)
    if fault == "hang":
        writer.cfg = replace(writer.cfg, timeout_s=3.0)
    start = time.monotonic()
    with pytest.raises(LineProcessError, match=message):
        writer.write(encoded, videos, GREEDY, version=0)
    while members(writer.process.process.pid):  # killed, and dead in a moment
        time.sleep(0.05)
        assert (
            time.monotonic() - start < 60
        )  # not the two minutes that an answer may take
    with pytest.raises(LineProcessError, match=r"worker\.py"):
        writer.write(encoded, videos, GREEDY, version=0)
    writer.close()


def members(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (
            "another prompt",
            LineProcessError,
            r"(?s)\[0\].*\[198\]",
        ),
        ("no bias", RuntimeError, r"\[\d"),
    ],
)
def test_unexpected_prompt_or_banned_id_raises(
    model, encoded, videos, fault, error, message
):
    writer = VllmBackend(config(fault), model)
    writer.sync(0)
    with pytest.raises(error, match=message):
        writer.write(encoded, videos, GREEDY, version=0)
    writer.close()


def test_failed_start_raises_with_stderr(model):
    writer = VllmBackend(config("no memory"), model)
    with pytest.raises(
        LineProcessError,
        match=r"memory",
    ):
        writer.sync(0)
    writer.close()


def test_deleted_backend_ends_process_and_folder(model):
    writer = VllmBackend(config("hang"), model)
    writer.sync(0)
    process, folder = writer.process.process, writer.folder
    del writer
    assert process.returncode == 0
    assert not folder.exists()


def test_worker_environment_lacks_launcher_variables(model, monkeypatch):
    for name in (
        "PYTHONPATH",
        "RANK",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "TORCHELASTIC_RUN_ID",
    ):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HOME", "/somewhere")
    found = VllmBackend(
        CotBackendConfig(kind="vllm", python=sys.executable, env={"A": "b"}), model
    )._environment()
    assert not {
        "PYTHONPATH",
        "RANK",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "TORCHELASTIC_RUN_ID",
    } & set(found)
    assert (found["A"], found["HOME"], found["VLLM_NO_USAGE_STATS"]) == (
        "b",
        "/somewhere",
        "1",
    )
    assert os.environ["RANK"] == "1"


def test_unsuitable_model_or_python_is_refused(model):
    with pytest.raises(FileNotFoundError, match="/nowhere/python"):
        VllmBackend(CotBackendConfig(kind="vllm", python="/nowhere/python"), model)
    with pytest.raises(ValueError, match="python"):
        CotBackendConfig(kind="vllm")
    judge = talker()
    judge.settings = VideoSettings(**{**vars(SETTINGS), "temporal_patch_size": 4})
    with pytest.raises(ValueError, match="temporal_patch_size=4"):
        VllmBackend(config(), judge)


@pytest.mark.parametrize("ending", [" ", "\n"])
def test_template_joined_to_time_stamp_is_refused(ending):
    """As with the real vocabulary, where " <" is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE(
            vocab={x: i for i, x in enumerate([*alphabet, "Ġ<"])}, merges=[("Ġ", "<")]
        )
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
    )
    judge = talker()
    judge.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    judge.template = PromptTemplate("{prompt}\nVideo:" + ending, "")
    if ending == " ":
        with pytest.raises(ValueError, match="newline"):
            VllmBackend(config(), judge)
    else:
        VllmBackend(config(), judge).close()
