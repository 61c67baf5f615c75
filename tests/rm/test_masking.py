"""Which text of a chain is dropped: probabilities, units, and that nothing else is lost."""

from __future__ import annotations

from collections import Counter

import pytest

from common.distributed import derive_seed
from rm.config import Masking
from rm.masking import dropped_share, mask, units

ANSWER = '<answer>{"dimensional_scores": {"subject": "2. or 1.\\n\\n"}}</answer>'
CHAIN = f"Stage 1. It asks for a ball! Is it red?\nYes.\n\nStage 2. A ball.\n{ANSWER}"


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("cot", [CHAIN]),
        (
            "section",
            [
                "Stage 1. It asks for a ball! Is it red?\nYes.\n\n",
                "Stage 2. A ball.\n",
                ANSWER,
            ],
        ),
        (
            "sentence",
            [
                "Stage 1.",
                " It asks for a ball!",
                " Is it red?",
                "\nYes.",
                "\n\nStage 2.",
                " A ball.\n",
                ANSWER,
            ],
        ),
    ],
)
def test_units_by_hand(unit: str, expected: list[str]) -> None:
    assert units(CHAIN, unit) == expected
    assert "".join(units(CHAIN, unit)) == CHAIN


def test_lines_are_sections_where_there_is_no_empty_line() -> None:
    assert units("a b\nc\nd", "section") == ["a b\n", "c\n", "d"]
    assert units("", "section") == units("", "sentence") == []


def test_cot_mask_is_drawn_by_probability_each_epoch() -> None:
    how = Masking(probability=0.3)
    drops = [
        [mask(("x", "y"), how, seed=0, epoch=e, row=r) == ("", "") for r in range(5000)]
        for e in (0, 1)
    ]
    # 5000 draws: standard deviation 0.0065
    assert sum(drops[0]) / 5000 == pytest.approx(0.3, abs=0.026)
    both = Counter(zip(*drops, strict=True))
    assert both[True, True] / 5000 == pytest.approx(0.09, abs=0.017)


def test_pair_masks_agree_and_video_masks_differ() -> None:
    texts = ("One. Two. Three. Four.", "1. 2. 3. 4.")
    pairs = [
        mask(texts, Masking(0.5, "pair", "sentence"), seed=1, epoch=0, row=r)
        for r in range(200)
    ]
    names = (["One.", " Two.", " Three.", " Four."], ["1.", " 2.", " 3.", " 4."])
    kept = [
        [[name in text for name in of] for text, of in zip(pair, names, strict=True)]
        for pair in pairs
    ]
    assert all(a == b for a, b in kept)
    assert {sum(a) for a, _ in kept} == {0, 1, 2, 3, 4}
    alone = [
        mask(("x", "y"), Masking(0.5, "video"), seed=1, epoch=0, row=r)
        for r in range(2000)
    ]
    # independent: a quarter each, standard deviation 0.0097
    assert all(
        count / 2000 == pytest.approx(0.25, abs=0.04)
        for count in Counter(alone).values()
    )
    assert len(Counter(alone)) == 4


@pytest.mark.parametrize("unit", ["cot", "section", "sentence"])
def test_mask_probability_0_keeps_and_1_drops_all(unit: str) -> None:
    assert mask((CHAIN, "b"), Masking(0.0, "video", unit), seed=0, epoch=0, row=0) == (
        CHAIN,
        "b",
    )
    assert mask((CHAIN, "b"), Masking(1.0, "video", unit), seed=0, epoch=0, row=0) == (
        "",
        "",
    )


def test_the_draw_of_a_pair_is_documented_by_its_seed() -> None:
    """Runs already measured stay reproducible."""
    for row in range(50):
        dropped = derive_seed(7, "mask", 2, row) < 0.4 * 2**63
        assert mask(("x", "y"), Masking(0.4), seed=7, epoch=2, row=row) == (
            ("", "") if dropped else ("x", "y")
        )


def test_the_share_of_text() -> None:
    assert dropped_share("abcd", "a") == 0.75
    assert dropped_share("", "") == 0.0
