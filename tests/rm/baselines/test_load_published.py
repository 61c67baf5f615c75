"""The converted VideoReward and HPSv3 give the published numbers and use every tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.memory import AdaptiveBatcher
from launch import convert_reward
from rm.baselines.load_published import (
    LoadedModel,
    read_hpsv3,
    read_instruction,
    read_videoreward,
)
from rm.baselines.qwen2_vl import (
    Layout,
    Qwen2VLRewardModel,
    frame_indices_qwen_utils,
    reward_head,
)
from rm.config import VideoSettings
from rm.prompt import CONTROL_TOKENS
from tests import public_checkpoints as public
from tests.launch.processes import next_step
from tests.public_checkpoints import NORMAL, VIDEO_TOKENS, Released, resized
from tests.tiny_qwen import random_frames

PROMPTS = ["a cat", "a red ball rolls, slowly", "rain"]
# Vision: 2 layers of 12 tensors, patch embedding 1, merger 6.
# Text: 2 layers of 12 tensors, embeddings, norm, lm_head.
VISION, TEXT = 2 * 12 + 1 + 6, 2 * 12 + 3
PTH = "checkpoint-11352/model.pth"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return public.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def video_release() -> Released:
    return public.videoreward()


@pytest.fixture(scope="module")
def image_release() -> Released:
    return public.hpsv3()


@pytest.fixture
def video_folder(tmp_path: Path, video_release: Released) -> Path:
    return public.write_videoreward(tmp_path / "VideoReward", video_release)


@pytest.fixture
def image_folder(tmp_path: Path, image_release: Released) -> Path:
    return public.write_hpsv3(tmp_path / "HPSv3", image_release)


def convert_videoreward(folder: Path, base: Path, **options: object) -> LoadedModel:
    options = {
        "base": base,
        "instruction": folder / "instruction.txt",
        "allow_pickle": True,
        **options,
    }
    return read_videoreward(folder, **options)


@pytest.mark.parametrize("names", ["old", "new"])
def test_videoreward_equals_the_published_code(
    names: str, tmp_path: Path, base: Path, video_release: Released
) -> None:
    """12 frames of 64 x 96 at 4 fps are 3 s: 6 are seen, resized to 280 x 392.

    That is at least 100,352 pixels, in multiples of 28.
    """
    folder = public.write_videoreward(
        tmp_path / "VideoReward", video_release, old=names == "old"
    )
    read = convert_videoreward(folder, base)
    assert (read.tensors, read.merged) == (VISION + TEXT + 2 * 7 * 2 + 1, 14)
    seen = [0, 2, 4, 7, 9, 11]
    for seed, prompt in enumerate(PROMPTS):
        video = random_frames(seed, frames=12, size=64).repeat(1, 1, 2, 1)[:, :, :96]
        want_31 = video_release.reward(
            resized(video[seen], 280, 392), prompt, video=True
        )
        want = [
            (float(want_31[i, 0]) - mean) / std
            for i, (mean, std) in enumerate(NORMAL.values())
        ]
        found = read.model.read_video(video, prompt, fps=4.0)
        # Pillow and torch resize alike up to a grey level here and there
        torch.testing.assert_close(found, torch.tensor(want), rtol=0, atol=2e-3)
        assert found.unique().numel() == 3


@pytest.mark.parametrize("names", ["old", "new"])
def test_hpsv3_equals_the_published_code(
    names: str, tmp_path: Path, base: Path, image_release: Released
) -> None:
    """Every image has at least 200,704 pixels: 64 x 96 becomes 392 x 560."""
    folder = public.write_hpsv3(tmp_path / "HPSv3", image_release, old=names == "old")
    read = read_hpsv3(folder, base=base, instruction=folder / "instruction.txt")
    assert (read.tensors, read.merged) == (VISION + TEXT + 6, 0)
    for seed, prompt in enumerate(PROMPTS):
        frames = random_frames(seed, frames=3, size=96)[:, :64]
        want = [
            image_release.reward([one], prompt, video=False)
            for one in resized(frames, 392, 560)
        ]
        found_NK = read.model.read_images(
            frames, prompt, portions=AdaptiveBatcher(2, what="frames")
        )
        torch.testing.assert_close(found_NK, torch.cat(want), rtol=0, atol=2e-3)
        assert float(found_NK[:, 0].std()) > 0.02


def test_videoreward_positions_are_counted_and_video_and_prompt_matter(
    video_folder: Path, base: Path
) -> None:
    """In three dimensions, as a plain Qwen2-VL would place it, the same video has another score."""
    model = convert_videoreward(video_folder, base).model
    video = random_frames(0, frames=8, size=64)
    counted = model.read_video(video, "a cat", fps=4.0)
    plain = model.backbone.forward

    def in_three_dimensions(**options: torch.Tensor) -> object:
        options.pop("position_ids")
        kinds = (options["input_ids"] == model.backbone.config.video_token_id).int() * 2
        return plain(**options, mm_token_type_ids=kinds)

    model.backbone.forward = in_three_dimensions
    assert (
        float((model.read_video(video, "a cat", fps=4.0) - counted).abs().max()) > 0.02
    )
    model.backbone.forward = plain
    other = model.read_video(random_frames(1, frames=8, size=64), "a cat", fps=4.0)
    assert float((other - counted).abs().min()) > 0.02
    # the prompt stands behind two of the three tokens
    asked = model.read_video(
        video, "many dogs that run over a field of snow " * 5, fps=4.0
    )
    torch.testing.assert_close(asked[:2], counted[:2], rtol=0, atol=1e-5)
    assert float((asked - counted)[2].abs()) > 0.005


def test_saved_and_loaded_model_gives_equal_rewards(
    video_folder: Path, base: Path, tmp_path: Path
) -> None:
    model = convert_videoreward(video_folder, base).model
    model.save(tmp_path / "ours")
    again = Qwen2VLRewardModel.load(tmp_path / "ours")
    video = random_frames(0, frames=8, size=64)
    assert torch.equal(
        again.read_video(video, "a cat", fps=4.0),
        model.read_video(video, "a cat", fps=4.0),
    )
    assert again.layout == model.layout
    assert not any(p.requires_grad for p in again.parameters())
    half = Qwen2VLRewardModel.load(tmp_path / "ours", dtype="bfloat16")
    assert half.backbone.dtype == torch.bfloat16
    assert next(half.head.parameters()).dtype == torch.float32


def test_saved_model_with_damaged_weights_is_refused(
    video_folder: Path, base: Path, tmp_path: Path
) -> None:
    convert_videoreward(video_folder, base).model.save(tmp_path)
    file = tmp_path / "model.safetensors"
    sound = load_file(file)
    # The first, the last and the head's weights.
    names = sorted(sound)
    for name in (names[0], names[-1], next(n for n in names if "head" in n)):
        broken = {**sound, name: torch.full_like(sound[name], torch.nan)}
        save_file(broken, file)
        with pytest.raises(ValueError, match="NaN") as caught:
            Qwen2VLRewardModel.load(tmp_path)
        assert str(tmp_path) in str(caught.value)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="git-LFS"):
        Qwen2VLRewardModel.load(tmp_path)


@pytest.mark.parametrize("place", [0, -1])
def test_published_weights_with_nan_are_refused(
    image_folder: Path, base: Path, place: int
) -> None:
    file = image_folder / "HPSv3.safetensors"
    state = load_file(file)
    name = sorted(name for name in state if "lm_head" not in name)[place]
    state[name].view(-1)[place] = torch.nan
    save_file(state, file)
    instruction = image_folder / "instruction.txt"
    with pytest.raises(ValueError, match=r"HPSv3\.safetensors holds numbers"):
        read_hpsv3(image_folder, base=base, instruction=instruction)


def test_prompt_cannot_spell_a_special_token(video_folder: Path, base: Path) -> None:
    """A reward token in a prompt would be a fourth score, an end of turn another conversation."""
    model = convert_videoreward(video_folder, base).model
    harmless = model.encode("a cat", (1, 4, 4))
    text = public.VIDEO_INSTRUCTION.format(text_prompt="a cat")
    assert (
        harmless
        == model.tokenizer(
            public.CHAT.format(pads="<|video_pad|>" * 4, text=text)
        ).input_ids
    )
    special = model.tokenizer.convert_tokens_to_ids([*VIDEO_TOKENS, *CONTROL_TOKENS])
    for word in (
        *VIDEO_TOKENS,
        "<|im_end|>",
        "<|video_pad|>",
        "{prompt}",
        "{text_prompt}",
    ):
        ids = model.encode(f"a {word} cat", (1, 4, 4))
        assert [i for i in ids if i in special] == [
            i for i in harmless if i in special
        ], word
        assert word in model.tokenizer.decode(ids).split("prompt - ")[1], word


@pytest.mark.parametrize(
    ("count", "fps", "want"),
    [
        (81, 16.0, 10),  # 5.06 s
        (12, 4.0, 6),
        (16, 8.0, 4),  # 2 s: exactly
        (9, 8.0, 4),  # 1.1 s: never fewer than 4
        (7, 2.0, 6),  # 7 would be odd, and 8 are not there
        (5, 2.0, 4),
        (3, 8.0, 2),
        (1, 8.0, 1),
        (10_000, 5.0, 768),
    ],
)
def test_frame_indices_qwen_utils_number_of_frames(
    count: int, fps: float, want: int
) -> None:
    """VideoAlign's smart_nframes by hand: count / fps * 2, made even.

    It lies between 4 and an even min(768, count).
    """
    seen = frame_indices_qwen_utils(count, fps, VideoSettings())
    assert len(seen) == want
    assert seen[0] == 0
    assert want == 1 or seen[-1] == count - 1
    assert seen == sorted(set(seen))


def test_head_with_an_output_for_every_token(video_folder: Path, base: Path) -> None:
    """VideoReward can be trained with three outputs: token k then has output k.

    The published weights have a single output.
    """
    model = convert_videoreward(video_folder, base).model
    rows = torch.randn(3, model.head.in_features)
    video, found = random_frames(0, frames=8, size=64), []
    for row in rows:
        model.head = reward_head({"weight": row[None]})
        found.append(model.read_video(video, "a cat", fps=4.0))
    model.head = reward_head({"weight": rows})
    want = torch.stack([found[k][k] for k in range(3)])
    torch.testing.assert_close(model.read_video(video, "a cat", fps=4.0), want)
    model.head = reward_head({"weight": rows[:2]})
    with pytest.raises(
        ValueError,
        match="3",
    ):
        model.read_video(video, "a cat", fps=4.0)


def test_rewards_depend_on_fps(video_folder: Path, base: Path) -> None:
    model = convert_videoreward(video_folder, base).model
    video = random_frames(0, frames=16, size=64)
    assert (
        float(
            (
                model.read_video(video, "x", fps=8.0)
                - model.read_video(video, "x", fps=2.0)
            )
            .abs()
            .max()
        )
        > 0.02
    )


def test_reward_head_by_names_of_weights() -> None:
    assert reward_head({"weight": torch.ones(1, 3)})(
        torch.tensor([1.0, 2.0, 3.0])
    ).tolist() == [6.0]
    state = {"0.weight": -torch.ones(2, 3), "0.bias": torch.tensor([7.0, 5.0])}
    state |= {"3.weight": torch.ones(1, 2), "3.bias": torch.tensor([0.5])}
    assert reward_head(state)(torch.tensor([1.0, 2.0, 3.0])).tolist() == [
        1.5
    ]  # relu(7 - 6) + relu(5 - 6) + 0.5
    with pytest.raises(ValueError, match="layer_1"):
        reward_head({"layer_1.weight": torch.ones(1, 3)})


def change(file: Path, keys: tuple[str, str], value: object) -> None:
    raw = json.loads(file.read_text())
    raw[keys[0]][keys[1]] = value
    file.write_text(json.dumps(raw))


class TestWrongInput:
    def test_pickle_without_allow_pickle_is_refused(
        self, video_folder: Path, base: Path
    ) -> None:
        with pytest.raises(ValueError, match="--allow-pickle"):
            convert_videoreward(video_folder, base, allow_pickle=False)

    def test_pickle_with_other_objects_is_refused(
        self, video_folder: Path, base: Path
    ) -> None:
        torch.save({"x": Path("y")}, video_folder / PTH)
        with pytest.raises(ValueError, match="Path"):
            convert_videoreward(video_folder, base)

    @pytest.mark.parametrize(
        ("keys", "value", "message"),
        [
            (
                ("data_config", "sample_type"),
                "multi_pts",
                "multi_pts",
            ),
            (
                ("data_config", "num_frames"),
                8,
                "num_frames=8",
            ),
            (("data_config", "fps"), None, "TypeError"),
            (("inference_config", "VQ_std"), 0.0, "normal.VQ"),
            (("peft_lora_config", "use_rslora"), True, "use_rslora"),
            (("peft_lora_config", "lora_r"), 8, "r=8"),
        ],
    )
    def test_unpublished_config_is_refused(
        self, video_folder: Path, base: Path, keys, value, message
    ) -> None:
        change(video_folder / "model_config.json", keys, value)
        with pytest.raises(ValueError, match=message):
            convert_videoreward(video_folder, base)

    def test_missing_or_unexpected_tensor_is_named(
        self, image_folder: Path, base: Path, image_release: Released
    ) -> None:
        state = {
            name: value.clone()
            for name, value in image_release.model.state_dict().items()
        }
        state.pop("lm_head.weight")  # it is not read
        options = {"base": base, "instruction": image_folder / "instruction.txt"}
        lost = state.pop("model.visual.merger.ln_q.weight")
        save_file(state, image_folder / "HPSv3.safetensors")
        with pytest.raises(ValueError, match=r"visual\.merger\.ln_q\.weight"):
            read_hpsv3(image_folder, **options)
        state |= {
            "model.visual.merger.ln_q.weight": lost,
            "model.visual.extra": lost.clone(),
        }
        save_file(state, image_folder / "HPSv3.safetensors")
        with pytest.raises(ValueError, match=r"visual\.extra"):
            read_hpsv3(image_folder, **options)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "{text_prompt} <|VQ_reward|> <|MQ_reward|>",
                r"TA_reward",
            ),
            (
                "{text_prompt} <|MQ_reward|> <|VQ_reward|> <|TA_reward|>",
                "order",
            ),
            ("<|VQ_reward|> <|MQ_reward|> <|TA_reward|>", r"\b0\b"),
            ("{prompt} {text_prompt}", r"\b2\b"),
        ],
    )
    def test_instruction_without_its_slots_is_refused(
        self, video_folder: Path, base: Path, text: str, message: str
    ) -> None:
        (video_folder / "instruction.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            convert_videoreward(video_folder, base)

    def test_missing_files_are_named(
        self, video_folder: Path, base: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(
            FileNotFoundError,
            match=r"judge\.json",
        ):
            Qwen2VLRewardModel.load(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"HPSv3\.safetensors"):
            read_hpsv3(
                tmp_path, base=base, instruction=video_folder / "instruction.txt"
            )
        (video_folder / PTH).unlink()
        with pytest.raises(FileNotFoundError, match="checkpoint-11352"):
            convert_videoreward(video_folder, base)
        (video_folder / "model_config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"model_config\.json"):
            convert_videoreward(video_folder, base)

    def test_layout_with_unknown_normal_is_refused(
        self, video_folder: Path, base: Path, tmp_path: Path
    ) -> None:
        convert_videoreward(video_folder, base).model.save(tmp_path / "ours")
        file = tmp_path / "ours" / "judge.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "outputs": ["VQ"]}))
        with pytest.raises(ValueError, match="MQ"):
            Layout.load(file)


def test_command_writes_everything_or_nothing(
    video_folder: Path,
    image_folder: Path,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "out"
    words = [
        "videoreward",
        "--official",
        str(video_folder),
        "--base",
        str(base),
        "--out",
        str(out),
    ]
    words += [
        "--instruction",
        str(video_folder / "instruction.txt"),
        "--dtype",
        "float32",
    ]
    with pytest.raises(SystemExit, match="2"):
        convert_reward.main(words)
    assert "--allow-pickle" in capsys.readouterr().err
    assert not out.exists()
    convert_reward.main([*words, "--allow-pickle"])
    printed = capsys.readouterr().out
    assert "87 tensors" in printed
    assert " 14 linears" in printed
    assert "2.25" in printed
    override = next_step(printed)[0]
    assert override == f"rewards.videoreward.checkpoint={out}"
    assert Qwen2VLRewardModel.load(out).layout.outputs == ("VQ", "MQ", "TA")
    with pytest.raises(SystemExit, match="2"):
        convert_reward.main([*words, "--allow-pickle"])
    assert str(out) in capsys.readouterr().err
    words = [
        "hpsv3",
        "--official",
        str(image_folder),
        "--base",
        str(base),
        "--out",
        str(tmp_path / "hps"),
    ]
    convert_reward.main(
        [*words, "--instruction", str(image_folder / "instruction.txt")]
    )
    assert Qwen2VLRewardModel.load(tmp_path / "hps").layout.media == "image"
    assert read_instruction(image_folder / "instruction.txt").count("{prompt}") == 1
