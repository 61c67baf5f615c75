"""A model's folder loads with every weight as it is stored, or is refused with the names."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Qwen3VLForConditionalGeneration,
    UMT5EncoderModel,
)

from common.strict_loading import errors_of, is_finite, load_pretrained, require_finite
from tests.documented import ROOT
from tests.tiny import build_tiny_wan
from tests.tiny_qwen import save_tiny_qwen

MODELS = {
    "qwen": (Qwen3VLForConditionalGeneration, "qwen", "model.safetensors"),
    "auto": (AutoModelForImageTextToText, "qwen", "model.safetensors"),
    "text": (UMT5EncoderModel, "wan/text_encoder", "model.safetensors"),
    "transformer": (
        WanTransformer3DModel,
        "wan/transformer",
        "diffusion_pytorch_model.safetensors",
    ),
    "vae": (AutoencoderKLWan, "wan/vae", "diffusion_pytorch_model.safetensors"),
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all models, as they should be."""
    path = tmp_path_factory.mktemp("sound")
    save_tiny_qwen(path / "qwen")
    build_tiny_wan(path / "wan")
    return path


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest, sound: Path, tmp_path: Path) -> Folder:
    return Folder(request.param, sound, tmp_path / "model")


class Folder:
    """A copy of a model's folder, to be damaged."""

    def __init__(self, name: str, sound: Path, path: Path) -> None:
        self.model_class, part, self.file_name = MODELS[name]
        shutil.copytree(sound / part, path)
        self.path = path
        self.file = path / self.file_name

    def load(self, **options: Any) -> torch.nn.Module:
        return load_pretrained(self.model_class, self.path, **options)

    def change(self, change: Callable[[Tensors], Any]) -> None:
        tensors = load_file(self.file)
        change(tensors)
        save_file(tensors, self.file)

    def names(self) -> list[str]:
        """The first, a middle and the last weight of more than one dimension."""
        matrices = [n for n, t in sorted(load_file(self.file).items()) if t.dim() > 1]
        return [matrices[0], matrices[len(matrices) // 2], matrices[-1]]

    def split(self) -> tuple[Path, Path]:
        """Store the weights in two shards and an index."""
        tensors = load_file(self.file)
        names = sorted(tensors)
        half = len(names) // 2
        stem = self.file_name.removesuffix(".safetensors")
        shards = (
            self.path / f"{stem}-00001-of-00002.safetensors",
            self.path / f"{stem}-00002-of-00002.safetensors",
        )
        places = {}
        for shard, part in zip(shards, (names[:half], names[half:]), strict=True):
            save_file({name: tensors[name] for name in part}, shard)
            places |= dict.fromkeys(part, shard.name)
        index = {"metadata": {}, "weight_map": places}
        (self.path / f"{self.file_name}.index.json").write_text(json.dumps(index))
        self.file.unlink()
        return shards

    def refused(self, *words: str) -> str:
        """Loading raises, with these words and a file of this folder in its message."""
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            self.load()
        message = str(caught.value)
        for word in (str(self.path), *words):
            assert word in message
        return message


def test_load_pretrained_equals_the_files(model: Folder) -> None:
    stored = load_file(model.file)
    loaded = model.load(dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in stored.items())
    shards = model.split()
    again = model.load(dtype=torch.float32).state_dict()
    assert again.keys() == loaded.keys()
    assert all(torch.equal(again[name], value) for name, value in loaded.items())
    assert len(shards) == 2


@pytest.mark.parametrize("which", [0, 1, 2])
def test_missing_tensor_is_refused(model: Folder, which: int) -> None:
    name = model.names()[which]
    model.change(lambda tensors: tensors.pop(name))
    model.refused(f"missing {name}", model.file_name)


def test_unexpected_and_renamed_tensors_are_refused(model: Folder) -> None:
    name = model.names()[1]
    model.change(lambda tensors: tensors.update({"added.weight": tensors.pop(name)}))
    model.refused("unexpected added.weight", f"missing {name}")


def test_prefixed_tensors_are_refused(model: Folder) -> None:
    tensors = {f"wrapped.{n}": t for n, t in load_file(model.file).items()}
    save_file(tensors, model.file)
    model.refused("unexpected wrapped.")


@pytest.mark.parametrize("which", [0, 2])
def test_tensor_of_another_shape_is_refused(model: Folder, which: int) -> None:
    name = model.names()[which]
    before = tuple(load_file(model.file)[name].shape)
    model.change(lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    after = (before[0] - 1, *before[1:])
    model.refused(f"{name} is {after}, want {before}")


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (float("nan"), torch.float32),
        (float("inf"), torch.bfloat16),
        (-float("inf"), torch.float16),
    ],
)
def test_number_that_is_not_finite_is_refused(
    model: Folder, value: float, dtype: torch.dtype
) -> None:
    name = model.names()[2]

    def spoil(tensors: Tensors) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name].view(-1)[-1] = value

    model.change(spoil)
    model.refused("NaN or infinite", name, model.file_name)


def test_damaged_shard_is_named(model: Folder) -> None:
    first, second = model.split()
    tensors = load_file(second)
    name = sorted(tensors)[-1]
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, second)
    model.refused(name, second.name)
    save_file({n: t for n, t in tensors.items() if n != name}, second)
    model.refused(name, f"{second} lacks")
    save_file({**tensors, "added": torch.zeros(1)}, second)
    model.refused(f"{second} holds added")
    save_file({**tensors, name: tensors[name].unsqueeze(0).clone()}, second)
    model.refused(f"{name} in {second.name} is ")
    second.write_bytes(first.read_bytes()[:-10])
    model.refused(str(second))
    second.unlink()
    model.refused(f"lacks {second.name}")


def test_pickled_weights_are_not_read(model: Folder) -> None:
    """A pickle is refused, next to the config or under an index, whatever it holds."""
    pickle = model.file.with_suffix(".bin").name
    if model.file_name == "model.safetensors":
        pickle = "pytorch_model.bin"
    torch.save(load_file(model.file), model.path / pickle)
    model.file.unlink()
    model.refused(pickle)


def test_quantised_weights_are_not_read(model: Folder) -> None:
    name = model.names()[0]
    for dtype, word in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")):
        model.change(
            lambda tensors, dtype=dtype: tensors.update({name: tensors[name].to(dtype)})
        )
        model.refused(name, word)


def test_config_of_another_kind_is_refused(model: Folder) -> None:
    config_file = model.path / "config.json"
    config = json.loads(config_file.read_text())
    if model.model_class is not AutoModelForImageTextToText:
        key = "_class_name" if "_class_name" in config else "model_type"
        config_file.write_text(json.dumps({**config, key: "clip"}))
        model.refused("clip", "config.json")
    for text in ("{", "[1]", "", '"x"', "[" * 100_000):
        config_file.write_text(text)
        model.refused("config.json")
    config_file.unlink()
    model.refused("config.json")


def test_config_of_another_size_is_refused(model: Folder) -> None:
    config_file = model.path / "config.json"
    config = json.loads(config_file.read_text())
    changes = {
        "dim_mult": [2, 1, 1, 1],
        "num_layers": 3,
        "text_config": {**config.get("text_config", {}), "num_hidden_layers": 3},
    }
    for key, value in changes.items():
        if key in config:
            config_file.write_text(json.dumps({**config, key: value}))
            model.refused("problems")
    if "text_config" in config:
        text = {**config["text_config"], "hidden_size": "many"}
        config_file.write_text(json.dumps({**config, "text_config": text}))
        model.refused("hidden_size")


def test_tied_weights_may_be_stored_under_either_name(
    sound: Path, tmp_path: Path
) -> None:
    """UMT5's table is shared.weight and encoder.embed_tokens.weight; without both it is refused."""
    text = Folder("text", sound, tmp_path / "text")
    names = ("shared.weight", "encoder.embed_tokens.weight")
    tensors = load_file(text.file)
    (stored,) = [name for name in names if name in tensors]
    table = tensors.pop(stored)
    for name in names:
        save_file({**tensors, name: table}, text.file)
        assert torch.equal(text.load().shared.weight, table)
    save_file({**tensors, names[0]: table, names[1]: table.clone()}, text.file)
    assert torch.equal(text.load().encoder.embed_tokens.weight, table)
    save_file(tensors, text.file)
    text.refused("missing shared.weight")
    save_file({**tensors, names[0]: table, names[1]: table + 1}, text.file)
    text.refused(names[1], "tied")


def test_a_refusal_is_the_only_report(
    sound: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The libraries' warnings come through again afterwards."""
    qwen = Folder("qwen", sound, tmp_path / "qwen")
    qwen.change(lambda tensors: tensors.popitem())
    logger = logging.getLogger("transformers.modeling_utils")
    with caplog.at_level(logging.WARNING):
        qwen.refused("missing")
        assert "MISSING" not in caplog.text
        logger.propagate = True
        logger.warning("heard")
    assert not logger.filters


def test_require_finite_names_at_most_ten_tensors(tmp_path: Path) -> None:
    state = {f"w{i}": torch.full((3,), torch.inf) for i in range(12)}
    state["sound"] = torch.full((3,), 3e38)
    with pytest.raises(ValueError, match=r"FILE .* 12 tensors: w0.*w9$") as caught:
        require_finite(state, "FILE")
    assert "sound" not in str(caught.value)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
@pytest.mark.parametrize("size", [1, 7, 64, 4099])
def test_is_finite_at_every_place(dtype: torch.dtype, size: int) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        for place in {0, size // 2, size - 1}:
            tensor = torch.randn(size).to(dtype)
            assert is_finite(tensor)
            tensor[place] = value
            assert not is_finite(tensor)
    assert is_finite(torch.full((size,), torch.finfo(dtype).max, dtype=dtype))
    assert is_finite(torch.zeros(0, dtype=dtype))
    assert is_finite(torch.arange(3))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_errors_of_names_the_file_that_is_no_json(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(ROOT / "assets/shapes/qwen", tmp_path / "qwen")
    broken = tmp_path / "qwen" / name
    broken.write_bytes(broken.read_bytes()[:-40])
    with (
        pytest.raises(ValueError, match=re.escape(str(broken))),
        errors_of(tmp_path / "qwen", "tokenizer"),
    ):
        AutoTokenizer.from_pretrained(tmp_path / "qwen")


def test_errors_of_names_the_folder_and_lets_others_pass() -> None:
    words = r"FOLDER .* tokenizer .*'x'"
    with pytest.raises(ValueError, match=words), errors_of("FOLDER", "tokenizer"):
        raise KeyError("x")
    with pytest.raises(ZeroDivisionError), errors_of("FOLDER", "tokenizer"):
        raise ZeroDivisionError


# What reads no weights, or gets only weights that were checked.
READERS = (
    "AutoTokenizer",
    "AutoConfig",
    "AutoImageProcessor",
    "FlowMapEulerDiscreteScheduler",
    "Qwen2VLConfig",
)


def test_no_file_loads_weights_another_way() -> None:
    """Weights come by load_pretrained, or by build_model, which has checked them."""
    found = set()
    for folder in ("common", "rm", "generator", "engine", "alignment", "launch", "toy"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            for name in re.findall(
                r"(\w+)\s*\.from_pretrained\(\s", text.replace("(", "( ")
            ):
                if name not in READERS:
                    found.add((file.relative_to(ROOT).as_posix(), name))
    assert found == {
        ("common/strict_loading.py", "model_class"),
        ("rm/convert/weights.py", "model_class"),
        ("generator/pipeline.py", "pipeline_class"),
    }


def test_matrices_of_zeros_are_reported(
    model: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    """A preallocated file whose download was aborted has a sound header."""
    model.load()
    assert "zeros" not in capsys.readouterr().out
    name = model.names()[1]
    model.change(lambda tensors: tensors[name].zero_())
    model.load()
    assert name.rpartition(".")[0] in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_weights_stored_as_integers_are_refused(
    model: Folder, dtype: torch.dtype
) -> None:
    name = model.names()[0]
    model.change(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ValueError, match=re.escape(name)):
        model.load()


def test_folder_with_a_quantization_config_is_refused(model: Folder) -> None:
    file = model.path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantization_config"):
        model.load()
