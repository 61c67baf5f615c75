"""Which videos become a pair, and the set of pairs on disk."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

from alignment.config import PairConfig
from alignment.pair_store import LatentPair, PairSet, write_pairs
from alignment.pairs import choose, normalised_value

NAN = math.nan


def rewards(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def how(**changes: object) -> PairConfig:
    return PairConfig(**{"candidates": 3, **changes})


def test_normalised_value_does_not_depend_on_units() -> None:
    """Ten times the reward plus seven has the same normal form; weights 3 and 1 make 3/4, 1/4."""
    one, other = rewards([0.0, 2.0], [4.0, 2.0]), rewards([0.0, 4.0], [2.0, 2.0])
    std = math.sqrt(2.0)  # of both: 0, 2, 4, 2 around 2
    value = normalised_value({"a": one, "b": 10 * other + 7}, {"a": 3.0, "b": 1.0})
    by_hand = [[-2 * 3 - 2, 0 + 2], [2 * 3, 0]]
    assert torch.allclose(value, torch.tensor(by_hand, dtype=torch.float64) / std / 4)


def test_reward_of_weight_0_and_constant_reward_count_nothing() -> None:
    one = rewards([0.0, 1.0, 2.0])
    plain = normalised_value({"a": one}, {"a": 1.0})
    assert torch.equal(
        normalised_value({"a": one, "b": -one}, {"a": 1.0, "b": 0.0}), plain
    )
    assert torch.allclose(
        normalised_value({"a": one, "b": 0 * one}, {"a": 1.0, "b": 1.0}), plain / 2
    )
    with pytest.raises(ValueError, match="weight"):
        normalised_value({"a": one}, {"a": 0.0})


def test_choose_takes_the_best_and_the_worst() -> None:
    found = choose(
        {"a": rewards([1.0, 3.0, 2.0], [5.0, 5.0, 4.0], [6.0, 0.0, 6.0])},
        {"a": 1.0},
        how(),
    )
    assert [(c.prompt, c.chosen, c.rejected) for c in found.pairs] == [
        (0, 1, 0),
        (1, 0, 2),
        (2, 0, 1),
    ]
    std = float(
        torch.tensor([1.0, 3, 2, 5, 5, 4, 6, 0, 6], dtype=torch.float64).std(
            correction=0
        )
    )
    assert [c.margin for c in found.pairs] == pytest.approx([2 / std, 1 / std, 6 / std])
    negative = choose({"a": rewards([1.0, 3.0, 2.0])}, {"a": -1.0}, how())
    assert [(c.chosen, c.rejected) for c in negative.pairs] == [(0, 1)]


def test_choose_counts_dropped_prompts_by_reason() -> None:
    one = rewards(
        [0.0, 1.0, 2.0],
        [1.0, 1.0, 1.0],
        [1.0, NAN, NAN],
        [0.0, NAN, 2.0],
        [0.0, 0.1, 0.2],
        [0.0, 1.0, 3.0],
    )
    two = rewards(
        [0.0, 5.0, 1.0],
        [1.0, 2.0, 3.0],
        [1.0, 2.0, 3.0],
        [9.0, NAN, 8.0],
        [0.0, 0.5, 1.0],
        [1.0, 0.0, 1.0],
    )
    weights = {"a": 1.0, "b": 0.0}
    found = choose({"a": one, "b": two}, weights, how(min_margin=0.5))
    # 1 is a tie, 2 has a single scored video, 4 is too close; 3's reward of weight 0 prefers the
    # rejected video, which it may
    assert [(c.prompt, c.chosen, c.rejected) for c in found.pairs] == [
        (0, 2, 0),
        (3, 2, 0),
        (5, 2, 0),
    ]
    assert (found.unscored, found.close, found.disagreed) == (1, 2, 0)
    strict = choose({"a": one, "b": two}, {"a": 1.0, "b": 1e-6}, how(min_margin=0.5))
    assert strict.disagreed == 1
    assert [c.prompt for c in strict.pairs] == [0, 5]
    lenient = choose(
        {"a": one, "b": two},
        {"a": 1.0, "b": 1e-6},
        how(min_margin=0.5, agreement=False),
    )
    assert [c.prompt for c in lenient.pairs] == [0, 3, 5]


def test_tie_is_no_pair_at_min_margin_0() -> None:
    found = choose(
        {"a": rewards([1.0, 1.0, 1.0], [1.0, 1.0, 2.0])},
        {"a": 1.0},
        how(min_margin=0.0),
    )
    assert [c.prompt for c in found.pairs] == [1]
    assert found.close == 1


def pair(i: int, prompt: str = "a cat", value: float | None = 1.0) -> LatentPair:
    chosen = torch.full((2, 1, 2, 2), float(i))
    return LatentPair(
        prompt,
        chosen,
        -chosen,
        torch.full((3, 4), i + 0.5),
        value,
        None if value is None else -value,
        f"seed {i}",
    )


def written(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    prompts = ["a cat", "rain", "a cat", "snow", "rain"]
    pairs = (
        pair(i, prompt, None if i == 3 else float(i))
        for i, prompt in enumerate(prompts)
    )
    assert (
        write_pairs(folder, pairs, per_shard=2, dtype=dtype, about={"made": "here"})
        == 5
    )
    return folder


def test_pair_set_reads_what_write_pairs_wrote(tmp_path: Path) -> None:
    found = PairSet(written(tmp_path), check="sha256")
    assert len(found) == 5
    assert found.latent_shape == (2, 1, 2, 2)
    assert found.about == {"made": "here"}
    batch = found.read([4, 1, 2])
    assert batch.prompts == ("rain", "rain", "a cat")
    assert batch.chosen_NCFHW[:, 0, 0, 0, 0].tolist() == [4.0, 1.0, 2.0]
    assert torch.equal(batch.rejected_NCFHW, -batch.chosen_NCFHW)
    assert batch.embeddings.keys() == {"rain", "a cat"}
    assert batch.embeddings["a cat"].tolist() == [[2.5] * 4] * 3
    values = found.values()
    assert values[1].tolist() == [1.0, -1.0]
    assert bool(values[3].isnan().all())
    assert [row.source for row in found.rows] == [f"seed {i}" for i in range(5)]


def test_write_pairs_is_deterministic_to_the_byte(tmp_path: Path) -> None:
    def digest(folder: Path) -> dict[str, str]:
        files = sorted(path for path in written(folder).rglob("*") if path.is_file())
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }

    one, two = digest(tmp_path / "one"), digest(tmp_path / "two")
    assert one == two
    assert len(one) == 2 + 3


def test_bfloat16_pairs_are_read_as_fp32(tmp_path: Path) -> None:
    found = PairSet(written(tmp_path, torch.bfloat16))
    assert found.read([3]).chosen_NCFHW.dtype == torch.float32
    assert found.read([3]).chosen_NCFHW.unique().tolist() == [3.0]


def test_interrupted_rewrite_leaves_no_manifest(tmp_path: Path) -> None:
    written(tmp_path)

    def stopped():
        yield from (pair(i) for i in range(3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pairs(tmp_path, stopped(), per_shard=2, dtype=torch.float32, about={})
    with pytest.raises(ValueError, match=r"manifest\.json"):
        PairSet(tmp_path)


def test_incomplete_or_changed_set_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json"):
        PairSet(tmp_path)
    folder = written(tmp_path / "set")
    shard = folder / "shards" / "00001.safetensors"
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    PairSet(folder)  # as long as before
    with pytest.raises(ValueError, match=r"00001\.safetensors"):
        PairSet(folder, check="sha256")
    shard.write_bytes(sound[:-1])
    with pytest.raises(ValueError, match=r"00001\.safetensors"):
        PairSet(folder)
    shard.write_bytes(sound)
    lines = (folder / "index.jsonl").read_text().splitlines(keepends=True)
    (folder / "index.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="4"):
        PairSet(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 1}))
    with pytest.raises(ValueError, match="version"):
        PairSet(folder)


def test_unusual_line_separators_in_a_prompt_survive_the_set(tmp_path: Path) -> None:
    prompt = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei"
    latent = torch.zeros(1, 1, 2, 2)
    made = LatentPair(prompt, latent, latent, torch.zeros(3, 4), source=prompt)
    write_pairs(tmp_path, iter([made] * 2), per_shard=1, dtype=torch.float32, about={})
    found = PairSet(tmp_path)
    assert [row.prompt for row in found.rows] == [prompt, prompt]
    assert found.rows[0].source == prompt
    shard = tmp_path / "shards" / "00000.safetensors"
    assert shard.stat().st_mode == (tmp_path / "index.jsonl").stat().st_mode
