from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import pytest

from common.config import ConfigError, WandbConfig, dump, load, parse_command_line
from common.run_record import hide_secrets, is_secret, versions
from common.safe_yaml import YamlError, parse
from common.schema import config

ROOT = Path(__file__).resolve().parents[2]


@config
class RewardConfig:
    weight: float = 1.0
    path: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@config
class SamplerConfig:
    num_steps: int = 16
    train_steps: int = 4
    kind: Literal["ode", "sde"] = "sde"
    pair: tuple[int, float] = (1, 2.0)
    names: tuple[Literal["q", "k"], ...] = ("q",)
    max_std: float | None = 0.45

    def __post_init__(self) -> None:
        if self.train_steps > self.num_steps:
            raise ValueError(
                f"train_steps={self.train_steps} > num_steps={self.num_steps}"
            )


@config
class GeneratorConfig:
    path: str
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    size: int | tuple[int, int] = 32


@config
class RunConfig:
    generator: GeneratorConfig = field(
        default_factory=lambda: GeneratorConfig("base", SamplerConfig(num_steps=8))
    )
    seed: int = 0
    lr: float = 1e-4
    flag: bool = False
    name: str = "run"
    rewards: dict[str, RewardConfig] = field(
        default_factory=lambda: {"descore": RewardConfig(2.0)}
    )
    wandb: WandbConfig | None = None
    api_key: str = ""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be >= 0")


@config
class NeedsPath:
    generator: GeneratorConfig


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(textwrap.dedent(text))
    return path


def errors_of(
    yaml_path: Path | None, *overrides: str, schema: type = RunConfig
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(schema, yaml_path, overrides)
    return caught.value.errors


class TestLoad:
    def test_defaults_then_yaml_then_overrides(self, tmp_path):
        path = write(
            tmp_path,
            """
            generator: {path: wan, sampler: {train_steps: 6, names: [k, q]}}
            lr: 1e-5
            rewards:
              motion: {weight: 2, options: {bins: [1, 2]}}
            wandb: {mode: offline}
            name: ${generator.path}-${seed}
            """,
        )
        overrides = (
            "seed=3",
            "rewards.motion.weight=0",
            "rewards.new.path=x",
            "seed=7",
            "generator.size=[4,5]",
        )
        assert load(RunConfig, path, overrides) == RunConfig(
            generator=GeneratorConfig(
                "wan",
                SamplerConfig(num_steps=8, train_steps=6, names=("k", "q")),
                (4, 5),
            ),
            seed=7,
            lr=1e-5,
            name="wan-7",
            rewards={
                "descore": RewardConfig(2.0),
                "motion": RewardConfig(0.0, None, {"bins": [1, 2]}),
                "new": RewardConfig(1.0, "x"),
            },
            wandb=WandbConfig("offline"),
        )

    def test_later_files_override_and_errors_name_their_file(self, tmp_path):
        first = write(
            tmp_path,
            "generator: {path: wan, sampler: {train_steps: 6}}\nlr: 1e-5\nname: one",
        )
        second = tmp_path / "second.yaml"
        second.write_text("generator: {sampler: {names: [k]}}\nname: two\n")
        found = load(RunConfig, [first, second], ["lr=2"])
        assert (
            found.generator.path,
            found.generator.sampler,
            found.name,
            found.lr,
        ) == (
            "wan",
            SamplerConfig(num_steps=8, train_steps=6, names=("k",)),
            "two",
            2.0,
        )
        second.write_text("generator: {sampler: {train_stps: 3}}\n")
        with pytest.raises(ConfigError, match=r"second\.yaml:1"):
            load(RunConfig, [first, second])

    def test_load_without_input_gives_defaults(self):
        assert load(RunConfig, None) == RunConfig()

    def test_an_empty_yaml_is_the_defaults(self, tmp_path):
        assert load(RunConfig, write(tmp_path, "# nothing yet\n")) == RunConfig()

    def test_overrides_are_text_where_text_is_wanted(self):
        texts = {
            "007": "007",
            "a: b": "a: b",
            "": "",
            '"q"': "q",
            "a=b": "a=b",
            "[x": "[x",
        }
        for given, wanted in texts.items():
            assert load(RunConfig, None, [f"name={given}"]).name == wanted
        assert (
            load(RunConfig, None, ["rewards.descore.path=null"]).rewards["descore"].path
            is None
        )
        assert (
            load(
                RunConfig, None, ["generator.sampler.max_std=null"]
            ).generator.sampler.max_std
            is None
        )
        assert load(
            RunConfig, None, ["generator.sampler.max_std=.inf"]
        ).generator.sampler.max_std == float("inf")

    def test_all_config_errors_are_reported_with_lines(self, tmp_path):
        path = write(
            tmp_path,
            """\
            generator:
              sampler: {num_stpes: 8, kind: odd, pair: [1], names: [v]}
            lr: fast
            flag: 1
            sede: 1
            rewards:
              motion: {wieght: 2}
              plain: 3
            wandb: {mode: ofline}
            sampler: {train_steps: 3}
            """,
        )
        got = errors_of(
            path,
            "foo",
            "=3",
            "seed=[1",
            "flag={a: b}",
            "generator.sampler.train_steps=50",
            "name.x=3",
        )
        # The start of the line, and the words or places that it must hold.
        wanted = [
            ("'foo':", "a.b=value"),
            ("'=3':", "a.b=value"),
            ("seed:", "yaml"),
            ("generator.sampler.num_stpes:", "'generator.sampler.num_steps'", ":2)"),
            ("generator.sampler.kind:", "'odd'"),
            ("generator.sampler.pair:", "[1]"),
            ("generator.sampler.names.0:", "'v'"),
            ("lr:", "'fast'", ":3)"),
            ("flag:", "(command line)"),
            ("sede:", "'seed'", ":5)"),
            ("rewards.motion.wieght:", "'rewards.motion.weight'"),
            ("rewards.plain:", "weight, path, options"),
            ("wandb.mode:", "'ofline'"),
            ("sampler.train_steps:", "'generator.sampler.train_steps'", ":10)"),
            ("name:", "string"),
        ]
        assert len(got) == len(wanted)
        for start, *parts in wanted:
            (line,) = [line for line in got if line.startswith(start)]
            assert all(part in line for part in parts), line

    def test_a_key_of_another_section_is_found(self):
        assert (
            "'generator.sampler.num_steps'" in errors_of(None, "sampler.num_stpes=4")[0]
        )
        assert "'generator.sampler.num_steps'" in errors_of(None, "num_steps=4")[0]

    def test_checks_of_sections_name_the_section_and_come_together(self):
        got = errors_of(
            None, "generator.sampler.train_steps=17", "seed=-1.5", "wandb.mode=on"
        )
        assert [line.split(":")[0] for line in got] == [
            "generator.sampler",
            "seed",
            "wandb.mode",
        ]
        assert all(line.endswith("(command line)") for line in got)
        assert "train_steps=17" in got[0]
        (line,) = errors_of(None, "seed=-1")
        assert line.startswith("config: seed=-1")
        assert line.endswith("(command line)")

    @pytest.mark.parametrize(
        ("override", "key"),
        [
            ("generator=[1]", "generator"),
            ("rewards=[1]", "rewards"),
            ("generator.sampler.names={a: 1}", "generator.sampler.names"),
        ],
    )
    def test_a_list_for_a_section_or_the_reverse_is_named(self, override, key):
        (error,) = errors_of(None, override)
        assert error.startswith(f"{key}: ")
        assert error.endswith("(command line)")

    def test_only_null_removes_an_entry(self, tmp_path):
        path = write(tmp_path, "rewards: {motion: {weight: 1}, taste: {weight: 2}}\n")
        assert set(load(RunConfig, path).rewards) == {"descore", "motion", "taste"}
        assert set(load(RunConfig, path, ["rewards.motion=null"]).rewards) == {
            "descore",
            "taste",
        }
        assert set(load(RunConfig, path, ["rewards.descore=null"]).rewards) == {
            "motion",
            "taste",
        }  # the schema's own
        again = load(
            RunConfig, path, ["rewards.taste=null", "rewards.taste.path=x"]
        ).rewards["taste"]
        assert again == RewardConfig(path="x")  # nothing of the yaml's is left
        second = tmp_path / "second.yaml"
        second.write_text("rewards:\n  motion: null\n")
        assert set(load(RunConfig, [path, second]).rewards) == {"descore", "taste"}
        (line,) = errors_of(path, "rewards.moton=null")
        assert "'rewards.motion'" in line
        assert line.endswith("(command line)")
        for empty in ("rewards={}", "rewards={ }"):
            assert "rewards.NAME=null" in errors_of(path, empty)[0]

    def test_a_dropped_typo_does_not_cause_a_second_error(self):
        # num_stpes=20 was meant to make room for train_steps=18
        got = errors_of(
            None, "generator.sampler.num_stpes=20", "generator.sampler.train_steps=18"
        )
        assert len(got) == 1
        assert "num_stpes" in got[0]

    def test_missing_required_key_is_reported(self, tmp_path):
        (line,) = errors_of(None, schema=NeedsPath)
        assert line.startswith("generator:")
        got = errors_of(None, "generator.size=3", schema=NeedsPath)
        assert [line.split(" ")[0] for line in got] == ["generator.path:"]
        assert load(NeedsPath, None, ["generator.path=p"]).generator.path == "p"

    @pytest.mark.parametrize(
        "override",
        ["lr=.nan", "seed=true", "seed=1e3", "flag=yes", "generator.size=[1,2,3]"],
    )
    def test_near_misses_of_a_type_are_errors(self, override):
        assert override.partition("=")[0] in errors_of(None, override)[0]

    @pytest.mark.parametrize("value", ["${nope}", "${nope", "${lr.x}"])
    def test_a_broken_interpolation_is_named(self, value):
        assert errors_of(None, f"seed={value}")[0].startswith("seed: ")

    def test_missing_or_broken_yaml_is_reported_with_other_errors(self, tmp_path):
        got = errors_of(tmp_path / "nope.yaml", "sede=1")
        assert "nope.yaml" in got[0]
        assert "'seed'" in got[1]
        assert "line 4" in errors_of(write(tmp_path, "seed: 1\nlr:\n  - [1\n"))[0]
        assert "value" in errors_of(write(tmp_path, "- 1\n"))[0]


class TestSafeYaml:
    def test_scalars_follow_yaml_1_2(self):
        text = "[1e-5, off, no, 1:30, 012, 0x1F, ~, true, 1_000, -.inf, 2020-01-01, '1', 1.e3]"
        wanted = [
            1e-5,
            "off",
            "no",
            "1:30",
            12,
            31,
            None,
            True,
            1000,
            float("-inf"),
            "2020-01-01",
            "1",
            1000.0,
        ]
        got = parse(text).value
        assert got == wanted
        assert [type(v) for v in got] == [type(v) for v in wanted]

    def test_keys_know_their_lines(self):
        assert parse("a:\n  b: 1\nc: 2\n").lines == {
            ("a",): 1,
            ("a", "b"): 2,
            ("c",): 3,
        }

    def test_python_tags_in_yaml_run_no_code(self, tmp_path):
        canary = tmp_path / "canary"
        for tag in (
            "!!python/object/apply:os.system",
            "!!python/name:os.system",
            "!custom",
            "!!binary",
            "!!timestamp",
        ):
            with pytest.raises(YamlError, match="tag"):
                parse(f"a: {tag} ['touch {canary}']")
        assert not canary.exists()

    def test_yaml_bombs_are_refused(self):
        start = time.perf_counter()
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [
            f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)
        ]  # 9^10 values
        bombs = ["\n".join(lines), "[" * 50_000, "a: &a [*a]", "x" * 1_000_001]
        for bomb in bombs:
            with pytest.raises(YamlError):
                parse(bomb)
        assert time.perf_counter() - start < 60.0

    def test_duplicate_yaml_key_raises(self):
        with pytest.raises(YamlError, match=r"\b2\b"):
            parse("a: 1\na: 2\n")


class TestDump:
    def test_round_trip(self, tmp_path):
        cfg = load(
            RunConfig,
            None,
            [
                "generator.size=[4,5]",
                "lr=1e-5",
                "name=007",
                "rewards.m.options={k: [1]}",
            ],
        )
        assert load(RunConfig, dump(cfg, tmp_path)) == cfg

    def test_environment_is_recorded(self, tmp_path):
        dump(RunConfig(), tmp_path)
        record = json.loads((tmp_path / "environment.json").read_text())
        import omegaconf

        assert record["packages"]["omegaconf"] == omegaconf.__version__
        assert record["python"] == ".".join(map(str, sys.version_info[:3]))
        assert set(record["git"]) == {"commit", "dirty"}

    def test_versions_of_all_packages_that_affect_numbers_are_recorded(self):
        """Requirements of setup.py; those of this list compute and decode nothing."""
        harmless = {
            "huggingface_hub", "pydantic", "pyyaml", "scipy", "psutil", "imageio", "imageio-ffmpeg",
            "jinja2", "matplotlib", "tqdm", "httpx", "tenacity", "fastapi", "uvicorn", "decord2",
            "tensorboard", "mkdocs", "mkdocs-material", "ruff", "playwright",
        }  # fmt: skip
        text = (ROOT / "setup.py").read_text(encoding="utf-8").partition('"test":')[0]
        required = set(re.findall(r'"([\w-]+)>=', text))
        assert "av" in required
        assert required - harmless <= set(versions())

    def test_secrets_reach_no_file(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh123")
        monkeypatch.setattr(
            sys,
            "argv",
            ["grpo.py", "api_key=sk-hidden-1", "lr=1", "name=hf_abcdefgh123"],
        )
        cfg = load(
            RunConfig,
            None,
            [
                "api_key=sk-hidden-1",
                "name=x-${oc.env:HF_TOKEN}",
                "rewards.r.options.password=pw-2",
            ],
        )
        assert cfg.name == "x-hf_abcdefgh123"
        dump(cfg, tmp_path)
        everything = "".join(
            path.read_text() for path in tmp_path.rglob("*") if path.is_file()
        )
        for secret in ("hf_abcdefgh123", "sk-hidden-1", "pw-2"):
            assert secret not in everything
        assert "max_std: 0.45" in everything


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("PGPASSWORD", True),
        ("GITHUB_PAT", True),
        ("accessToken", True),
        ("HF-TOKEN", True),
        ("auth", True),
        ("bearer", True),
        ("privateKey", True),
        ("db_passwd", True),
        ("Cookie", True),
        ("creds", True),
        ("jwt", True),
        ("path", False),
        ("author", False),
        ("pattern", False),
        ("keyboard", False),
        ("tokenizer", False),
        ("token_env", False),
        ("monkey", False),
    ],
)
def test_names_of_secrets(name: str, secret: bool) -> None:  # noqa: FBT001
    assert is_secret(name, "a value") is secret


def test_secrets_in_the_query_of_an_address_are_masked() -> None:
    text = "https://h/x?api_key=abc&size=3 https://b/?sig=XYZ"
    assert hide_secrets(text) == "https://h/x?api_key=***&size=3 https://b/?sig=***"


def test_passwords_inside_addresses_are_masked(monkeypatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://me:pass-word-1@db:5432/x")
    text = "http://user:pw@host:8900/v1 uses pass-word-1; me@example.org is no address"
    assert hide_secrets(text) == (
        "http://***@host:8900/v1 uses ***; me@example.org is no address"
    )


def demo_program(folder: Path) -> Path:
    """Write an entry point: schema, command line, and torch imported only afterwards."""
    path = folder / "program.py"
    path.write_text(
        textwrap.dedent(
            """
            import atexit, sys
            from dataclasses import field
            from common.config import parse_command_line
            from common.schema import config

            @config
            class Sampler:
                num_steps: int = 16

            @config
            class Run:
                sampler: Sampler = field(default_factory=Sampler)

            imported = lambda: "torch" in sys.modules
            atexit.register(lambda: sys.stderr.write(f"torch imported: {imported()}\\n"))
            line = parse_command_line(Run, description="demo")
            sys.stdout.write(f"{line.cfg.sampler.num_steps} {line.resume}\\n")
            """
        )
    )
    return path


def run_program(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(demo_program(folder)), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False
    )


class TestCommandLine:
    def test_a_typo_exits_2_without_torch(self, tmp_path):
        done = run_program(tmp_path, "sampler.num_stpes=4", "smapler.num_steps=x")
        assert done.returncode == 2
        assert "2 mistakes" in done.stderr
        assert "'sampler.num_steps'" in done.stderr
        assert "torch imported: False" in done.stderr

    def test_only_rank_0_prints_and_all_ranks_exit(self, tmp_path):
        done = run_program(tmp_path, "sampler.num_stpes=4", RANK="1")
        assert done.returncode == 2
        assert "mistake" not in done.stderr

    def test_options_and_overrides_in_any_order(self, tmp_path):
        path = write(tmp_path, "seed: 5\nlr: 0.5\n")
        argv = [
            "--local_rank=1",
            "lr=0.25",
            "--config",
            str(path),
            "name=x",
            "--resume",
            "none",
            "--frames",
            "9",
        ]
        line = parse_command_line(
            RunConfig,
            argv,
            description="x",
            extend=lambda parser: parser.add_argument("--frames", type=int),
        )
        assert (line.cfg.seed, line.cfg.lr, line.cfg.name) == (5, 0.25, "x")
        assert line.resume == "none"
        assert line.args.config == [path]
        assert line.args.overrides == ["lr=0.25", "name=x"]
        assert line.args.frames == 9
        assert (
            parse_command_line(RunConfig, ["--local-rank", "0"], description="x").resume
            == "auto"
        )

    def test_unknown_options_exit_2(self, capsys):
        with pytest.raises(SystemExit) as caught:
            parse_command_line(RunConfig, ["--conifg", "x.yaml"], description="x")
        assert caught.value.code == 2
        assert "--conifg" in capsys.readouterr().err


@config
class Place:
    run_dir: str
    words: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("run_dir= runs/a", "runs/a"),
        ("run_dir=runs/a ", "runs/a"),
        ("run_dir=\truns/a b\n", "runs/a b"),
        ("run_dir=' runs/a'", " runs/a"),
        ("run_dir= 'runs/a'", "runs/a"),
        ("run_dir= ", ""),
    ],
)
def test_blanks_around_a_text_are_dropped(text, value):
    assert load(Place, None, [text]).run_dir == value


@pytest.mark.parametrize(
    "override",
    [
        "run_dir=a\ud83d",
        'run_dir="a\\ud83d"',
        'words=["a", "\\udc80"]',
        'options={deep: {name: "\\ud83d"}}',
        "ru\udcffn_dir=a",
    ],
)
def test_lone_surrogate_is_a_mistake_of_its_key(override):
    with pytest.raises(ConfigError, match=r"half of a character") as error:
        load(Place, None, ["run_dir=x", override])
    (line,) = error.value.errors
    # the message itself can be printed
    assert line.encode()


def test_lone_surrogate_in_a_yaml_has_its_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text('words: [a]\nrun_dir: "a\\ud83d"\n')
    with pytest.raises(ConfigError, match=r"run_dir: .*run\.yaml:2\)"):
        load(Place, path)


def test_below_is_the_text_of_the_layers_before(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("generator: {path: here}\n")
    over = tmp_path / "over.yaml"
    over.write_text("generator: {path: '${below}_over'}\n")
    assert load(RunConfig, [base, over]).generator.path == "here_over"
    # twice, as any other layer
    assert load(RunConfig, [base, over, over]).generator.path == "here_over_over"
    assert (
        load(RunConfig, base, ["generator.path=${below}/x"]).generator.path == "here/x"
    )


def test_below_without_a_recipe_is_a_mistake_with_its_line(tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("seed: 1\nlr: ${below}\n")
    with pytest.raises(ConfigError, match=r"needs a text under it.*over.yaml:2"):
        load(RunConfig, over)
