"""Sets of pairs whose JSON files are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignment.pair_store import LatentPair, PairSet, write_pairs


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("manifest.json", "[]", "version"),
        ("manifest.json", "{", r"manifest\.json"),
        ("manifest.json", '{"version": 2}', "pairs"),
        (
            "manifest.json",
            '{"version": 2, "pairs": 1, "latent_shape": 3, "files": [], "about": {}}',
            "latent_shape",
        ),
        ("index.jsonl", '{"prompt": "a"}\n', r"index\.jsonl: 0\.shard"),
        ("index.jsonl", '["a"]\n', r"index\.jsonl:1"),
        (
            "index.jsonl",
            '{"prompt": 3, "shard": 0, "row": 0, "embedding": 0}\n',
            "prompt",
        ),
        (
            "index.jsonl",
            '{"prompt": "a", "shard": 0, "row": 0, "embedding": 0, "more": 1}\n',
            "more",
        ),
    ],
)
def test_set_of_odd_json_is_refused_with_file_and_field(
    tmp_path: Path, file: str, text: str, message: str
) -> None:
    pair = LatentPair(
        "a", torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.zeros(3, 4)
    )
    write_pairs(tmp_path, iter([pair]), per_shard=1, dtype=torch.float32, about={})
    assert len(PairSet(tmp_path)) == 1
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        PairSet(tmp_path)
