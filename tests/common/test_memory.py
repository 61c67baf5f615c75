from __future__ import annotations

import pytest
import torch

from common.memory import AdaptiveBatcher, peak_memory


class Limited:
    """Squares what fits: more than ``room`` items at once is out of memory."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.calls: list[int] = []

    def __call__(self, items: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(items))
        if len(items) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return items.square()


ITEMS = torch.arange(11.0)


@pytest.mark.parametrize(
    ("size", "calls"), [(None, [11]), (11, [11]), (4, [4, 4, 3]), (99, [11])]
)
def test_batch_size_is_used_while_it_fits(size: int | None, calls: list[int]) -> None:
    limited = Limited(99)
    assert torch.equal(
        AdaptiveBatcher(size, what="items").over(limited, ITEMS), ITEMS.square()
    )
    assert limited.calls == calls


def test_batch_is_halved_until_it_fits_and_stays(
    capsys: pytest.CaptureFixture[str],
) -> None:
    limited, portions = Limited(3), AdaptiveBatcher(None, what="latents")
    assert torch.equal(portions.over(limited, ITEMS), ITEMS.square())
    assert limited.calls == [11, 5, 2, 2, 2, 2, 2, 1]  # 11 does not fit, nor 5; 2 does
    assert portions.size == 2
    limited.calls.clear()
    portions.over(limited, ITEMS[:5])
    assert limited.calls == [2, 2, 1]
    assert "11 latents" in capsys.readouterr().out


def test_out_of_memory_keeps_finished_batches() -> None:
    limited, portions = Limited(4), AdaptiveBatcher(4, what="items")

    def later(items: torch.Tensor) -> torch.Tensor:
        limited.room = 4 if not limited.calls else 2  # another model came to the device
        return limited(items)

    assert torch.equal(portions.over(later, ITEMS), ITEMS.square())
    assert limited.calls == [4, 4, 2, 2, 2, 1]


def test_one_item_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        AdaptiveBatcher(4, what="items").over(Limited(0), ITEMS)
    fixed = AdaptiveBatcher(4, what="items")
    fixed.fixed = True
    with pytest.raises(torch.OutOfMemoryError):
        fixed.over(Limited(3), ITEMS)
    assert fixed.size == 4


def test_other_errors_are_not_caught() -> None:
    def broken(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes"):
        AdaptiveBatcher(4, what="items").over(broken, ITEMS)


def test_peak_memory_is_reported() -> None:
    """Half a GiB more than there ever was, on the CPU, where the whole process counts."""
    before = peak_memory()["memory/peak_gb"]
    held = torch.ones(int((before + 0.5) * 2**30 / 4))
    after = peak_memory()["memory/peak_gb"]
    assert after >= before + 0.5
    del held
    assert peak_memory()["memory/peak_gb"] == after
