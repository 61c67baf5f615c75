"""Every reward: scores do not depend on places, and score.py and serve.py take it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import uvicorn
from omegaconf import OmegaConf
from starlette.testclient import TestClient
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from alignment.config import RewardConfig
from alignment.rewards import REWARDS, build_rewards, wire
from alignment.rewards.brightness import Brightness
from common.files import read_jsonl
from common.run_record import plain
from common.types import RewardModel
from common.video_io import write_mp4
from launch import score
from launch.evaluation.files import ScoreItem, read_clip
from launch.schemas.server import ServeRun
from launch.server.app import create_app
from rm.config import Generation
from rm.model import DeScore
from tests import public_checkpoints as public
from tests.tiny import byte_tokenizer
from tests.tiny_qwen import SETTINGS, TEMPLATE, tiny_qwen, tiny_tokenizer
from toy.world import caption, random_attributes, random_scene, render

FPS, COUNT, ORDER = 8.0, 6, [4, 2, 0, 5, 1, 3]
OWN = """\
def score(video, prompts):
    return [float(v.float().mean()) + len(p) for v, p in zip(video, prompts)]
"""


def clip_folder(path: Path) -> str:
    tokenizer = byte_tokenizer()
    common = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        **common,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "projection_dim": 8,
    }
    text |= {
        "bos_token_id": 1,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**common, "image_size": 32, "patch_size": 8, "projection_dim": 8}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(path)
    return str(path)


def descore_folder(path: Path) -> str:
    """A random model whose chains of thought are cut at six tokens, then scored."""
    torch.manual_seed(1)
    DeScore(
        tiny_qwen(),
        tiny_tokenizer(),
        TEMPLATE,
        SETTINGS,
        264,
        Generation(max_new_tokens=6),
    ).save(path)
    return str(path)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server on loopback, in a thread."""
    cfg = ServeRun(rewards={"bright": RewardConfig(kind="brightness")})
    server = uvicorn.Server(
        uvicorn.Config(
            create_app({"bright": Brightness()}, cfg, token=None),
            port=0,
            log_level="error",
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def configs(
    tmp_path_factory: pytest.TempPathFactory, address: str
) -> dict[str, RewardConfig]:
    """One of every kind, and one by target, on tiny random checkpoints of the real layouts."""
    root = tmp_path_factory.mktemp("rewards")
    folders = public.converted(root)
    public.tiny_qwen2().save_pretrained(root / "g")
    tiny_tokenizer().save_pretrained(root / "g")
    (root / "words.txt").write_text("Rate it: {prompt}")
    (root / "mine.py").write_text(OWN)
    words = {
        "instruction": str(root / "words.txt"),
        "max_new_tokens": 2,
        "max_pixels": 28 * 28 * 4,
    }
    with torch.random.fork_rng():
        found = {
            "descore": RewardConfig(
                checkpoint=descore_folder(root / "d"), options={"cots": 0, "batch": 4}
            ),
            "similarity": RewardConfig(checkpoint=clip_folder(root / "c")),
        }
    found |= {
        "videoreward": RewardConfig(checkpoint=folders["videoreward"]),
        "hpsv3": RewardConfig(checkpoint=folders["hpsv3"], options={"frames": 2}),
        "generative": RewardConfig(checkpoint=str(root / "g"), options=words),
        "remote": RewardConfig(url=address),
        "mine": RewardConfig(target=f"{root / 'mine.py'}:score"),
    }
    return found | {name: RewardConfig() for name in REWARDS if name not in found}


@pytest.fixture(scope="module")
def rewards(configs: dict[str, RewardConfig]) -> dict[str, RewardModel]:
    return build_rewards(configs)


@pytest.fixture(scope="module")
def videos() -> tuple[torch.Tensor, list[str]]:
    rng = random.Random(0)
    wishes = [random_attributes(rng) for _ in range(COUNT)]
    prompts = [caption(wish, wording=0) for wish in wishes]
    prompts[::2] = prompts[1::2]  # of every other video it is another's
    return render([random_scene(wish, rng) for wish in wishes], side=96), prompts


KINDS = [*REWARDS, "mine"]


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_videos_have_permuted_scores_to_the_bit(
    kind: str, rewards, videos
) -> None:
    video_BTYXC, prompts = videos
    found = rewards[kind].score(video_BTYXC, prompts, fps=FPS)
    turned = rewards[kind].score(
        video_BTYXC[ORDER], [prompts[i] for i in ORDER], fps=FPS
    )
    want = found.take(ORDER)
    torch.testing.assert_close(
        turned.value_B, want.value_B, rtol=0, atol=0, equal_nan=True
    )
    assert set(turned.parts) == set(want.parts)
    for name, part_B in want.parts.items():
        torch.testing.assert_close(
            turned.parts[name], part_B, rtol=0, atol=0, equal_nan=True
        )
    assert list(turned.texts) == list(want.texts)
    if kind == "generative":  # a random model writes no scores
        assert found.value_B.isnan().all()
        assert len(set(found.texts)) > 1
    else:
        assert found.value_B.unique().numel() > 1


@pytest.mark.parametrize("kind", KINDS)
def test_served_reward_equals_direct_reward(
    kind: str, configs, rewards, videos
) -> None:
    video_BTYXC, prompts = videos
    want = rewards[kind].score(video_BTYXC, prompts, fps=FPS)
    cfg = ServeRun(rewards={kind: configs[kind]})
    with TestClient(
        create_app({kind: rewards[kind]}, cfg, token=None), base_url="http://127.0.0.1"
    ) as client:
        content = wire.encode_request(video_BTYXC, prompts, fps=FPS, model=kind, id="1")
        reply = client.post(
            "/v1/score", content=content, headers={"Content-Type": wire.SAFETENSORS}
        )
    got = wire.decode_reply(reply.content, videos=COUNT, model=kind, id="1").score
    torch.testing.assert_close(
        got.value_B, want.value_B, rtol=0, atol=0, equal_nan=True
    )
    assert list(got.texts) == list(want.texts)


def test_score_command_scores_with_every_reward(
    configs, rewards, videos, tmp_path: Path
) -> None:
    """H.264 moves a pixel by a level or two, so frames are read back from the files."""
    video_BTYXC, prompts = videos
    for i in range(3):
        write_mp4(tmp_path / f"{i}.mp4", video_BTYXC[i], FPS, crf=0)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts[:3]))
    OmegaConf.save(
        {"rewards": {name: plain(cfg) for name, cfg in configs.items()}},
        tmp_path / "score.yaml",
    )
    words = ["--config", str(tmp_path / "score.yaml"), "--videos", f"{tmp_path}/*.mp4"]
    words += [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--out",
        str(tmp_path / "scores.jsonl"),
    ]
    with pytest.raises(SystemExit, match="0"):
        score.main(words)
    rows = read_jsonl(tmp_path / "scores.jsonl")
    items = [ScoreItem("", tmp_path / f"{i}.mp4", prompts[i]) for i in range(3)]
    clips = [read_clip(item, max_frames=100) for item in items]
    # a random model writes no score, which is a failure with its reason
    for row in rows:
        missing = [name for name, value in row["rewards"].items() if value is None]
        errors = row["error"].split("; ") if "error" in row else []
        assert [error.partition(":")[0] for error in errors] == missing
    for name, reward in rewards.items():
        found = reward.score(
            torch.stack([clip.video_TYXC for clip in clips]),
            prompts[:3],
            fps=clips[0].fps,
        )
        want = [
            None if value != value else pytest.approx(value, abs=1e-5)
            for value in found.value_B.tolist()
        ]
        assert [row["rewards"][name] for row in rows] == want, name
