"""launch/export.py: the cards' commands load the trained weights with stock classes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from alignment.config import RewardConfig
from common.config import dump
from engine.config import OptimizerConfig
from generator.config import ExpertsConfig, SamplerConfig
from generator.sampler import initial_noise
from generator.wan import WanGenerator
from launch import export
from launch.schemas.training import GrpoRun
from rm.config import BackboneLora, LearningRates
from rm.model import DeScore
from rm.scorer import DeScoreScorer
from tests.generator.families import build_family, gap, stock_latents
from tests.generator.stock import latents, remarks
from tests.launch.processes import loaded_by_help, next_step, run
from tests.launch.release.test_hub import SECRET, Hub, online
from tests.tiny import build_tiny_wan, tiny_config, tiny_generator
from tests.tiny_qwen import (
    SETTINGS,
    TEMPLATE,
    random_frames,
    save_tiny_qwen,
    tiny_qwen,
    tiny_tokenizer,
)

ORACLE = "toy/oracle.py:ShapesOracle"
PROMPTS, SEEDS = ["rain", "a red circle"], [3, 4]
HUB_NAME = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_wan(tmp_path_factory.mktemp("base") / "wan")


def make_run(wan: Path, folder: Path, **changes: object) -> WanGenerator:
    """A run folder as launch/grpo.py leaves it, and what it trained: rank 4, alpha 8."""
    generator = tiny_generator(wan, **changes)
    cfg = GrpoRun(
        run_dir=str(folder),
        prompts=str(folder / "prompts.txt"),
        prompts_per_step=2,
        steps=3,
        generator=tiny_config(wan, **changes),
        rewards={
            "shapes": RewardConfig(weight=1.5, target=ORACLE),
            "brightness": RewardConfig(weight=0.0),
        },
        optimizer=OptimizerConfig(lr=3e-4),
    )
    dump(cfg, folder)
    rows = [
        {
            "step": i,
            "reward/shapes": 0.25 * i,
            "reward/shapes_std": 9.0,
            "train/loss": 1.0,
        }
        for i in range(3)
    ]
    rows.append(
        {"step": 3, "eval/shapes": 0.75}
    )  # what is measured after the last step has a line of its own
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    generator.save_trained(folder / "final")
    return generator


@pytest.fixture
def grpo(wan: Path, tmp_path: Path) -> WanGenerator:
    return make_run(wan, tmp_path / "grpo")


def exported(
    tmp_path: Path, *more: str, trained: str = "grpo/final", form: str = "merged"
) -> Path:
    export.main(
        [
            str(tmp_path / trained),
            "--format",
            form,
            "--out",
            str(tmp_path / "out"),
            *more,
        ]
    )
    return tmp_path / "out"


def ended(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    """Return the single line of stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        export.main(argv)
    assert stop.value.code == code
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def follow(card: Path, places: dict[str, Path], *, block: int = 0) -> dict[str, object]:
    """Run a block of Python of a card, its blanks filled in; in fp32, to compare numbers."""
    code = re.findall(r"```python\n(.*?)```", card.read_text(), re.S)[block]
    for blank, place in places.items():
        code = code.replace(f'"{blank}"', f'"{place}"')
    found: dict[str, object] = {"folder": str(card.parent)}
    exec(compile(code.replace("bfloat16", "float32"), str(card), "exec"), found)
    return found


@pytest.mark.parametrize("form", export.FORMATS)
def test_card_commands_load_both_transformers(tmp_path: Path, form: str) -> None:
    """Wan 2.2 A14B: an adapter for each transformer, trained one after the other."""
    base = build_family(tmp_path / "a14b", "T2V-A14B")
    sampler = SamplerConfig(
        num_steps=4,
        shift=12.0,
        stochastic_range=2,
        guidance_scale=3.0,
        guidance_scale_2=2.0,
    )
    changes = {"sampler": sampler, "experts": ExpertsConfig(train="low")}
    # the second run samples with the adapter of the first
    high = make_run(base, tmp_path / "high", sampler=sampler)
    generator = make_run(base, tmp_path / "low", **changes)
    generator.load_trained(tmp_path / "high" / "final")
    generator.save_trained(tmp_path / "low" / "final")
    want = generator.sample(PROMPTS, SEEDS)

    out = exported(tmp_path, trained="low/final", form=form)
    with remarks() as said:
        pipeline = follow(
            out / "README.md", {"path/to/this/folder": out, "path/to/the/base": base}
        )["pipeline"]
    assert [one for one in said if "eys" in one] == []
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.stack([initial_noise(seed, high.latent_shape) for seed in SEEDS])
    options = {"guidance_scale": 3.0, "guidance_scale_2": 2.0}
    got = stock_latents(pipeline, noise, PROMPTS, steps=4, shift=12.0, **options)
    assert gap(got, want) < 5e-5
    assert gap(high.sample(PROMPTS, SEEDS), want) > 0.01


@pytest.mark.parametrize("form", export.FORMATS)
def test_card_of_an_image_model_names_its_pipeline(tmp_path: Path, form: str) -> None:
    """WanPipeline would read the folder, and die in its first forward."""
    base = build_family(tmp_path / "i2v", "I2V-14B")
    make_run(base, tmp_path / "run", max_sequence_length=512)
    out = exported(tmp_path, trained="run/final", form=form)
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "image-to-video"
    assert "image-to-video" in card.data.tags
    places = {"path/to/this/folder": out, "path/to/the/base": base}
    pipeline = follow(out / "README.md", places)["pipeline"]
    assert type(pipeline).__name__ == "WanImageToVideoPipeline"
    loaded = [name for name, _ in pipeline.transformer.named_parameters()]
    assert any(".lora_" in name for name in loaded) == (form != "merged")


@pytest.mark.parametrize("form", export.FORMATS)
def test_card_command_loads_the_trained_weights(
    wan: Path, grpo: WanGenerator, tmp_path: Path, form: str
) -> None:
    out = exported(tmp_path, form=form)
    want = grpo.sample(PROMPTS, SEEDS, scheduler="pipeline", num_steps=4)
    with remarks() as said:
        pipeline = follow(
            out / "README.md", {"path/to/this/folder": out, "path/to/the/base": wan}
        )["pipeline"]
    assert [one for one in said if "eys" in one] == []
    pipeline.set_progress_bar_config(disable=True)
    got = latents(pipeline, PROMPTS, SEEDS, steps=4)
    torch.testing.assert_close(
        got, want, atol=1e-5, rtol=1e-5
    )  # latents are as large as 10
    with grpo.reference(), torch.no_grad():
        assert (
            grpo.sample(PROMPTS, SEEDS, scheduler="pipeline", num_steps=4) - got
        ).abs().max() > 0.1
    if form == "diffusers":
        name = "pytorch_lora_weights.safetensors"
        assert (out / name).read_bytes() == (
            tmp_path / "grpo/final" / name
        ).read_bytes()
    else:
        assert {f.name for f in out.iterdir()} == {
            "README.md",
            "out.safetensors" if form == "comfyui" else "transformer",
        }


def test_export_fully_trained_transformer_keeps_weights(
    wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = make_run(wan, tmp_path / "grpo", lora=None, dtype="bfloat16")
    with torch.no_grad():
        generator.module.proj_out.weight.mul_(1.5)
    generator.save_trained(tmp_path / "grpo/final")
    out = exported(tmp_path)
    # A block has 4 x 2 weights and 2 norms in each attention, 2 in its norm, 4 in its
    # feed-forward and 1 of modulation. Outside are 2 of patches, 4 + 2 of time, 4 of text and
    # 1 + 2 of the output.
    assert (
        f" {2 * (2 * (4 * 2 + 2) + 2 + 4 + 1) + 2 + 4 + 2 + 4 + 1 + 2} weights"
        in capsys.readouterr().out
    )
    pipeline = follow(
        out / "README.md", {"path/to/this/folder": out, "path/to/the/base": wan}
    )["pipeline"]
    found, want = pipeline.transformer.state_dict(), generator.module.state_dict()
    assert all(torch.equal(found[name], want[name].float()) for name in want)
    assert (
        str(wan) in (tmp_path / "grpo/final/transformer/config.json").read_text()
    )  # where it was loaded from
    assert str(wan) not in (out / "transformer/config.json").read_text()
    assert "adapters" in ended(
        capsys, 2, str(tmp_path / "grpo/final"), "--format", "comfyui", "--out", "x"
    )


@pytest.fixture
def descore(tmp_path: Path) -> DeScore:
    model = DeScore(tiny_qwen(), tiny_tokenizer(), TEMPLATE, SETTINGS, 264).eval()
    torch.nn.init.normal_(model.head.weight)
    model.save(tmp_path / "stage2/final")
    return model


@torch.no_grad()
def test_export_descore_keeps_rewards(
    tmp_path: Path, descore: DeScore, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stage 2 started from stage 1's folder, which started from a hub name: that is the base."""
    dual = {
        "checkpoint": str(tmp_path / "stage1/final"),
        "dual_rl": {"group_size": 8},
        "lr": {"llm": 1e-6},
    }
    cold = {"base": "Qwen/Qwen3-VL-8B-Instruct", "cold_start": {"epochs": 2.0}}
    for stage, config in (("stage1", cold), ("stage2", dual)):
        (tmp_path / stage / "final").mkdir(parents=True, exist_ok=True)
        (tmp_path / stage / "config.yaml").write_text(yaml.safe_dump(config))
    out = exported(tmp_path, trained="stage2/final")
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "Qwen/Qwen3-VL-8B-Instruct"
    assert (card.data.library_name, card.data.pipeline_tag) == (
        "transformers",
        "video-text-to-text",
    )
    assert "DeScore" in card.text
    assert re.search(r"`dual_rl\.group_size` \| 8 \|", card.text)

    code = re.findall(r"```python\n(.*?)```", card.text, re.S)[0]
    assert "DeScoreScorer.load(folder)" in code
    assert "scorer.score(" in code
    video = [random_frames(1)]
    found, want = (
        s.score(video, ["a"], fps=4.0)
        for s in (DeScoreScorer.load(out, cots=0), DeScoreScorer(descore, cots=0))
    )
    torch.testing.assert_close(found.value_B, want.value_B, atol=1e-5, rtol=0)
    model = follow(out / "README.md", {}, block=1)["model"]
    assert torch.equal(model.get_input_embeddings().weight[264:265], descore.query)
    assert "LoRA" in capsys.readouterr().out
    for words, options in (
        ("adapters", ("--format", "diffusers")),
        ("--base", ("--format", "merged", "--base", "x")),
    ):
        assert words in ended(
            capsys, 2, str(tmp_path / "stage2/final"), *options, "--out", "x"
        )


def test_export_of_a_bf16_descore_prints_what_the_merge_loses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_qwen(tmp_path / "base")
    model = DeScore.from_base(
        base, template=TEMPLATE, settings=SETTINGS, dtype=torch.bfloat16
    )
    lora = BackboneLora(rank=4, alpha=8.0)
    model.param_groups(LearningRates(), lora=lora, weight_decay=0.0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=7.4e-5)
    model.save(tmp_path / "stage1/final")
    out = exported(tmp_path, trained="stage1/final")
    printed = re.search(
        r"rounding to bfloat16 takes (\d\.\d+) of", capsys.readouterr().out
    )
    assert 0.5 < float(printed[1]) < 2.0
    assert not list(out.glob("adapter_*"))


def test_card_has_settings_and_no_secret_or_path(
    wan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run(wan, tmp_path / "grpo")
    path = tmp_path / "grpo/config.yaml"
    config = yaml.safe_load(path.read_text())
    config["generator"]["path"] = HUB_NAME
    config["grpo"]["scale"] = SECRET  # a plain word, were it not the value of a token
    config["grpo"]["reweight"] = str(tmp_path)
    config["rewards"][str(tmp_path)] = {"weight": 1.0}
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    out = exported(tmp_path, form="comfyui")
    text = (out / "README.md").read_text()
    front = ModelCard(text).data.to_dict()
    assert front == {
        "base_model": HUB_NAME,
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "tags": ["lora", "comfyui", "wan", "text-to-video", "rlhf", "grpo"],
    }
    for line in (
        "GRPO, 3 steps.",
        "Rewards: brightness (weight 0), shapes (weight 1.5).",
        "| `optimizer.lr` | 0.0003 |",
        "| `generator.lora.alpha` | 8 |",
        "| `reward/shapes` | 0 | 0.5 | 1 |",
        "- LoRA of 20 linears, rank 4, alpha 8, 60 tensors under the names of Wan's own code",
    ):
        assert line in text.split("\n")
    assert f'from_pretrained("{HUB_NAME}"' in text
    assert "shapes_std" not in text
    assert "grpo.reweight" not in text
    for file in (f for f in out.rglob("*") if f.is_file()):
        assert not any(
            word in file.read_bytes()
            for word in (str(tmp_path).encode(), str(wan).encode(), SECRET.encode())
        )
    printed = capsys.readouterr().out
    assert HUB_NAME in printed
    assert Path(next_step(printed)[0]).is_file()


def test_export_without_a_run_needs_base(
    wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_generator(wan).save_trained(tmp_path / "deep/er/lora")
    trained = str(tmp_path / "deep/er/lora")
    assert "--base" in ended(
        capsys, 2, trained, "--format", "merged", "--out", str(tmp_path / "x")
    )
    assert not (tmp_path / "x").exists()
    out = exported(
        tmp_path, "--base", str(wan), "--base-model", HUB_NAME, trained="deep/er/lora"
    )
    card = ModelCard.load(out / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == (
        HUB_NAME,
        "finetune",
    )
    assert "## Training" not in card.text


def test_wrong_input_exits_2_with_one_line(
    wan: Path, grpo: WanGenerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final, out = tmp_path / "grpo/final", tmp_path / "out"

    def error_of(trained: Path, *more: str, form: str = "merged") -> str:
        return ended(
            capsys, 2, str(trained), "--format", form, "--out", str(out), *more
        )

    assert str(final) in error_of(tmp_path / "grpo")
    assert "transformer/config.json" in error_of(wan / "vae")
    assert "'a/b/c'" in error_of(final, "--push", "a/b/c")
    assert "OWNER/NAME" in error_of(final, "--push", "name")
    assert "./nowhere" in error_of(final, "--base", "./nowhere")
    assert "owner/name" in error_of(final, "--base", "owner/name")
    other = build_tiny_wan(tmp_path / "other", layers=1)
    for form in export.FORMATS:
        assert "(10 problems)" in error_of(final, "--base", str(other), form=form)
    file = final / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert str(file) in error_of(final)
    (tmp_path / "grpo/config.yaml").write_text("a: [")
    assert "line 1" in error_of(final)
    (final / "descore.json").touch()
    assert "descore.json" in error_of(final)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").touch()
    assert str(out) in error_of(final)
    with pytest.raises(SystemExit) as stop:
        export.main([str(final), "--format", "merged", "--out", "x", "--public"])
    assert stop.value.code == 2
    assert "--push" in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--public",)])
def test_push_is_private_without_public(
    grpo: WanGenerator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple,
) -> None:
    online(monkeypatch, hub := Hub())
    out = exported(tmp_path, "--push", "me/lora", *options, form="diffusers")
    files = ["README.md", "pytorch_lora_weights.safetensors"]
    assert hub.asked == [
        ("create", "me/lora", not options),
        ("upload", "me/lora", files),
    ]
    assert (
        'load_lora_weights("me/lora", weight_name="pytorch_lora_weights.safetensors")'
        in (out / "README.md").read_text()
    )
    assert "https://huggingface.co/me/lora" in capsys.readouterr().out


def test_failed_push_exits_1_with_one_line(
    grpo: WanGenerator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failed(name: str) -> str:
        argv = [
            "--format",
            "diffusers",
            "--out",
            str(tmp_path / name),
            "--push",
            "me/lora",
        ]
        said = ended(capsys, 1, str(tmp_path / "grpo/final"), *argv)
        assert str(tmp_path / name) in said
        assert (tmp_path / name / "README.md").is_file()
        return said

    assert "HF_HUB_OFFLINE" in failed("offline")
    online(monkeypatch, token=None)
    assert "HF_TOKEN" in failed("no_token")
    online(monkeypatch)  # the hub's own client, and nobody at that address
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "ConnectError" in failed("no_network")


@pytest.mark.slow
def test_entry_point_merges_lora_and_fails_to_push_offline(
    wan: Path, grpo: WanGenerator, tmp_path: Path
) -> None:
    """The base comes from the run's config; the export exists although the push fails."""
    words = (
        str(tmp_path / "grpo/final"),
        "--format",
        "merged",
        "--out",
        str(tmp_path / "out"),
        "--push",
        "me/wan",
    )
    done = run(sys.executable, "launch/export.py", *words, expect=1)
    assert "HF_HUB_OFFLINE" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "alpha 8" in done.stdout
    assert "float32" in done.stdout
    name = "blocks.1.ffn.net.2"
    lora = load_file(tmp_path / "grpo/final/pytorch_lora_weights.safetensors")
    down, up = (
        lora[f"transformer.{name}.lora_{side}.weight"].double() for side in "AB"
    )
    before, after = (
        load_file(folder / "transformer/diffusion_pytorch_model.safetensors")[
            f"{name}.weight"
        ]
        for folder in (wan, tmp_path / "out")
    )
    torch.testing.assert_close(
        after.double() - before.double(), 8 / 4 * up @ down, atol=1e-6, rtol=0
    )


def test_help_imports_nothing_heavy() -> None:
    heavy = (
        "torch",
        "transformers",
        "diffusers",
        "peft",
        "safetensors",
        "huggingface_hub",
    )
    loaded, said = loaded_by_help("export", *heavy)
    assert loaded == []
    assert "--base-model" in said
