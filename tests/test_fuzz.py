"""Parsers of foreign input, on texts made by hypothesis: an answer or the documented error."""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignment.prompts import read_prompts
from alignment.rewards import wire as wire
from common.checkpoint import latest, verify
from common.config import ConfigError, load
from common.safe_yaml import YamlError, parse
from common.video_io import write_mp4
from generator.config import GeneratorConfig
from launch.schemas.training import GrpoRun
from rm.baselines.generative import FORMS
from rm.data import read_pairs
from rm.prompt import (
    DIMENSIONS,
    encode_text,
    parse_answer,
    parse_scores,
    preference_word,
)
from rm.video import VideoError, read_video
from tests.tiny_qwen import SETTINGS, tiny_tokenizer

T = TypeVar("T")
TOKENIZER = tiny_tokenizer()
EXAMPLES = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TEXT = st.text(max_size=200)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4)
    ),
    max_leaves=12,
)
NAMES = (
    st.sampled_from(
        [
            *DIMENSIONS,
            "dimensional_scores",
            "overall_score",
            "gsb_result",
            "video_1_scores",
        ]
    )
    | TEXT
)
ANSWERS = st.dictionaries(
    NAMES, JSON | st.dictionaries(NAMES, LEAVES, max_size=5), max_size=5
).map(lambda value: f"<answer>{json.dumps(value)}</answer>")


def outcome(call: Callable[[], T], error: type[Exception]) -> tuple[T | None, str]:
    """What comes of it, or what the one error that may be raised says."""
    try:
        return call(), ""
    except error as problem:
        return None, str(problem)


@EXAMPLES
@given(st.tuples(TEXT, ANSWERS | TEXT, TEXT).map("".join))
@pytest.mark.slow
def test_fuzz_cot_answers(text: str) -> None:
    answer = parse_answer(text)
    if answer is not None:
        assert set(answer.scores) <= set(DIMENSIONS)
        assert all(score in (None, 0, 1, 2) for score in answer.scores.values())
        assert answer.overall is None or math.isfinite(answer.overall)
    assert isinstance(preference_word(text), str)
    both = parse_scores(text)
    assert both is None or all(set(one) <= set(DIMENSIONS) for one in both)
    for form in FORMS.values():
        for label in form.labels.values():
            found = label.find(f"{label.words}: {text}")
            assert found is None or math.isfinite(float(found[1]))


@EXAMPLES
@given(
    TEXT, st.sampled_from(["", "<|im_end|>", "<|video_pad|>", "<|endoftext|>"]), TEXT
)
def test_fuzz_prompt_control_tokens(before: str, token: str, after: str) -> None:
    """No control token comes of it, and no word of it is lost."""
    ids = encode_text(TOKENIZER, before + token + after)
    assert not set(ids) & set(TOKENIZER.all_special_ids)
    assert TOKENIZER.decode(ids) == before + token + after


@EXAMPLES
@given(
    st.binary(max_size=300) | TEXT.map(str.encode), st.sampled_from([".txt", ".jsonl"])
)
def test_prompt_files(tmp_path: Path, content: bytes, form: str) -> None:
    path = tmp_path / f"prompts{form}"
    path.write_bytes(content)
    prompts, said = outcome(lambda: read_prompts(path), ValueError)
    assert prompts is None or all(prompt.strip() for prompt in prompts)
    assert prompts or "prompts" in said


CELLS = (
    st.sampled_from(
        [
            "A",
            "B",
            "same",
            "invalid",
            "['a.mp4', 'b.mp4']",
            "('../a', '/etc/passwd')",
            "[1]",
            "",
        ]
    )
    | TEXT
)


@EXAMPLES
@given(
    rows=st.lists(st.lists(CELLS, min_size=3, max_size=5), max_size=4),
    quoted=st.booleans(),
)
def test_tables_of_pairs(
    tmp_path: Path, rows: list[list[str]], *, quoted: bool
) -> None:
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(
            file, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
        )
        writer.writerow(["videos", "prompt", "GSB", "CoT_A", "CoT_B"])
        writer.writerows(rows)
    table, said = outcome(lambda: read_pairs(path, require_cot=False), ValueError)
    assert (
        "pairs.csv" in said
        if table is None
        else all(pair.label in (-1, 0, 1) for pair in table.pairs)
    )


@EXAMPLES
@given(
    TEXT
    | JSON.map(json.dumps)
    | st.lists(st.sampled_from("-:[]{}&*!\n #'\"a1"), max_size=40).map("".join)
)
def test_yaml(tmp_path: Path, text: str) -> None:
    outcome(lambda: parse(text), YamlError)
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(
        ConfigError
    ):  # no such text is a run: it lacks what a run must say
        load(GrpoRun, path)


@EXAMPLES
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["sampler.num_steps", "height", "lora.rank", "x"]), TEXT
        ),
        max_size=4,
    )
)
def test_overrides(words: list[tuple[str, str]]) -> None:
    changes = [f"{key}={value}" for key, value in words]
    cfg, said = outcome(
        lambda: load(GeneratorConfig, None, ["path=x", *changes]), ConfigError
    )
    assert said or cfg.path == "x"


VIDEO = torch.zeros(2, 2, 4, 6, 3, dtype=torch.uint8)
SOUND = wire.encode_request(VIDEO, ["a", "b"], fps=8.0, model="m", id="1")
ASKED = {
    "id": "1",
    "model": "m",
    "prompts": ["a"],
    "videos": [{"frames": "AAAA", "shape": [1, 1, 1, 3], "fps": 8}],
}


@EXAMPLES
@given(st.data())
def test_requests_of_a_server(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([wire.JSON, wire.SAFETENSORS]))
    if kind == wire.JSON:
        body = json.dumps(
            {**ASKED, data.draw(st.sampled_from([*ASKED, "x"])): data.draw(JSON)}
        ).encode()
    else:
        content = bytearray(SOUND)
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(SOUND) - 1))] = data.draw(
                st.integers(0, 255)
            )
        body = (
            bytes(content[: data.draw(st.integers(0, len(SOUND)))])
            if data.draw(st.booleans())
            else bytes(content)
        )
    request, _ = outcome(
        lambda: wire.decode_request(body, kind, wire.RequestLimits(8, 4)),
        wire.WireError,
    )
    if request is not None:
        assert len(request.items) == len(request.prompts)
        assert all(
            (item.video_TYXC is None) == (item.error is not None)
            for item in request.items
        )


@EXAMPLES
@given(JSON.map(json.dumps).map(str.encode) | st.binary(max_size=80))
def test_replies_of_a_server(body: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode_reply(body, videos=2, model="m", id="1")


@EXAMPLES
@given(
    JSON.map(json.dumps)
    | st.fixed_dictionaries({"step": LEAVES, "files": JSON}).map(json.dumps)
    | TEXT
)
def test_manifests(tmp_path: Path, text: str) -> None:
    """None of them vouches for a file that is not as they say."""
    folder = tmp_path / "step-000003"
    folder.mkdir(exist_ok=True)
    (folder / "engine.safetensors").write_bytes(b"not what was saved")
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    assert verify(folder)
    assert latest(tmp_path) is None


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("mp4") / "a.mp4"
    write_mp4(path, torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8), 4.0)
    return path.read_bytes()


@settings(EXAMPLES, max_examples=60)
@given(st.data())
def test_damaged_videos(mp4: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Damaged bytes give frames of the right form or the error that names the file."""
    content = bytearray(mp4)
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(mp4) - 1))] = data.draw(
            st.integers(0, 255)
        )
    start = data.draw(st.integers(0, len(mp4)))
    del content[start : start + data.draw(st.integers(0, 40))]
    path = tmp_path / "damaged.mp4"
    path.write_bytes(bytes(content))
    clip, said = outcome(lambda: read_video(path, SETTINGS), VideoError)
    assert "damaged.mp4" in said if clip is None else clip.frames_TYXC.shape[-1] == 3
    entry = {"mp4": base64.b64encode(bytes(content)).decode()}
    body = json.dumps({**ASKED, "videos": [entry]}).encode()
    (item,) = wire.decode_request(body, wire.JSON, wire.RequestLimits(64, 1)).items
    assert (item.video_TYXC is None) == (item.error is not None)
