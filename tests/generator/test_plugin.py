"""A generator of another class: from a file, from an installed package, and in the commands."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from common.config import ConfigError, load
from common.film import Film
from common.log import read_metrics
from generator import plugin
from generator.config import GeneratorConfig
from launch.compose import build_generator, say_long_prompts
from launch.planning.dry_run import check_generator, dry_run
from launch.rehearsal.stand_ins import adapt
from launch.schemas.pairs import PairsRun
from launch.schemas.training import GrpoRun, SampleRun
from tests.launch.processes import run

TARGET = "examples/own_generator.py:TintGenerator"
SAMPLE = Path("configs/shapes/sample.yaml")


def config(target: str) -> GeneratorConfig:
    return GeneratorConfig(path="none", target=target)


def test_target_file_is_called_with_config_and_seed(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "class Own:\n"
        "    def __init__(self, cfg, seed):\n"
        "        self.given = (cfg.path, seed)\n"
        f"for name in {plugin.NEEDED}:\n"
        "    setattr(Own, name, 0)\n"
        "def make(cfg, *, seed):\n"
        "    return Own(cfg, seed)\n"
    )
    made = build_generator(config(f"{tmp_path / 'own.py'}:make"), seed=7)
    assert made.given == ("none", 7)
    assert made.cfg.target.endswith(":make")
    assert made.sharded is False


def test_missing_method_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "class Own:\n    module = rollout = transition = decode = 0\n"
        "    reference = sample = save_trained = 0\n"
        "    def __init__(self, cfg, *, seed): pass\n"
    )
    with pytest.raises(ValueError, match="has no load_trained"):
        build_generator(config(f"{tmp_path / 'own.py'}:Own"))
    with pytest.raises(ValueError, match="did you mean 'Own'"):
        build_generator(config(f"{tmp_path / 'own.py'}:Owm"))


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("import nowhere_at_all\n", 1, "ModuleNotFoundError: No module"),
        ("def make(cfg, *, seed):\n    return cfg['x']\n", 2, "TypeError"),
        ("def make(cfg, *, seed:\n", 1, "SyntaxError"),
    ],
)
def test_what_a_file_raises_is_said_with_its_line(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        build_generator(config(f"{file}:make"))
    assert f"generator.target: {file}:{line}: " in str(error.value)


def test_file_may_import_the_example_of_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No module of the file's own imports is hidden by the file itself."""
    (tmp_path / "own_generator.py").write_text("class Tint:\n    pass\n")
    names = " = ".join(plugin.NEEDED)
    (tmp_path / "mine.py").write_text(
        "from own_generator import Tint\n"
        f"class Mine(Tint):\n    {names} = 0\n"
        "    def __init__(self, cfg, *, seed): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    # Another test may have imported the example.
    monkeypatch.delitem(sys.modules, "own_generator", raising=False)
    made = build_generator(config(f"{tmp_path / 'mine.py'}:Mine"))
    assert type(made).__mro__[1].__name__ == "Tint"
    del sys.modules["own_generator"]


def test_target_without_a_file_is_refused_by_the_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        config(f"{tmp_path / 'none.py'}:Own")
    with pytest.raises(ValueError, match="context_parallel=2"):
        GeneratorConfig(path="none", target=TARGET, context_parallel=2)


def test_entry_point_of_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package offers tests.fakes:FakeGenerator, which lacks what the commands ask for."""
    point = EntryPoint("tint", "tests.generator.test_plugin:make_fake", plugin.GROUP)
    monkeypatch.setattr(plugin, "entry_points", lambda group: [point])
    with pytest.raises(ValueError, match="no sample, save_trained, load_trained"):
        build_generator(config("tint"))
    with pytest.raises(ValueError, match="did you mean 'tint'"):
        build_generator(config("tnit"))


def make_fake(cfg: GeneratorConfig, *, seed: int) -> object:
    from tests.fakes import FakeGenerator

    return FakeGenerator()


def test_prompts_of_another_class_are_not_tokenized() -> None:
    """Wan's tokenizer would be looked for in the folder `none`."""
    say_long_prompts(["a red room"], config(TARGET))


def test_dry_run_of_another_class_checks_its_config(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It ends well without a plan, with the videos of an update and the config."""
    recipe = Path("configs/shapes/grpo_oracle.yaml")
    cfg = load(GrpoRun, recipe, [f"generator.target={TARGET}"])
    with pytest.raises(SystemExit) as ended:
        dry_run(cfg, "8xh100")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "a plan knows Wan only" in out
    assert "one update = 16 prompts x 8 members = 128 videos" in out
    assert "prompts_per_step: 16" in out


def test_what_knows_wan_only_says_so(tmp_path: Path) -> None:
    cfg = load(SampleRun, SAMPLE, [f"generator.target={TARGET}"])
    with pytest.raises(ValueError, match="a plan knows Wan only"):
        check_generator(cfg)
    with pytest.raises(ValueError, match="a rehearsal knows Wan only"):
        adapt(cfg, tmp_path, 1)
    with pytest.raises(ConfigError, match="a set of pairs knows Wan only"):
        load(
            PairsRun, Path("configs/shapes/pairs.yaml"), [f"generator.target={TARGET}"]
        )


@pytest.mark.long
def test_own_generator_trains_resumes_and_samples_by_the_commands(
    tmp_path: Path,
) -> None:
    """Its weights after steps 0 to 3 are those of an uninterrupted run, and sample.py uses them."""
    words = [
        sys.executable,
        "launch/grpo.py",
        "--config",
        "configs/shapes/grpo_oracle.yaml",
        f"generator.target={TARGET}",
        "generator.path=none",
        "rewards.oracle=null",
        "rewards.warm.target=examples/my_reward.py:score",
        "prompts_per_step=4",
        "optimizer.lr=0.05",
        "save_every=2",
        "evaluation.every=2",
        "evaluation.limit=4",
    ]
    run(*words, f"run_dir={tmp_path / 'a'}", "steps=2")
    run(*words, f"run_dir={tmp_path / 'a'}", "steps=4")
    run(*words, f"run_dir={tmp_path / 'b'}", "steps=4")
    file = "final/tint.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    rows = read_metrics(tmp_path / "b/metrics.jsonl")
    evaluated = [row["eval/warm"] for row in rows if "eval/warm" in row]
    assert evaluated[-1] > evaluated[0]

    # tuned and base, at the same seeds
    for name, extra in (("base", []), ("tuned", [f"adapter={tmp_path / 'b/final'}"])):
        run(
            sys.executable,
            "launch/sample.py",
            "--config",
            str(SAMPLE),
            f"generator.target={TARGET}",
            "generator.path=none",
            f"out={tmp_path / name}",
            "limit=2",
            *extra,
        )
    red = []
    for name in ("base", "tuned"):
        film = Film(tmp_path / name / "0000.mp4")
        mean = film.frames(range(film.count)).float().mean((0, 1, 2))
        red.append(float(mean[0] - mean[2]))
    assert red[1] > red[0]
