"""What a small decoder does to the order of rewards, by hand, and that training moves it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.config import load
from common.types import Score
from generator.scoring_decoder import ScoringDecoder
from generator.wan import WanGenerator
from launch.schemas.training import GrpoRun
from tests.tiny import build_tiny_wan, tiny_config
from toy import build_decoder
from toy.build_decoder import (
    CONFIG,
    PEAK,
    measure_groups,
    new_decoder,
    order_changes,
    train,
)
from toy.training import Fit


def test_order_changes_within_groups_by_hand() -> None:
    """Three members, three pairs a group; levels between groups do not count.

    The first group exchanges its last two: ranks 1 2 3 and 1 3 2 correlate by 1/2. The second
    makes a tie of its upper two: ranks 1 2 3 and 1 2.5 2.5 correlate by 1.5 / sqrt(2 x 1.5). The
    third orders what was a tie, and has no correlation.
    """
    whole_GM = torch.tensor([[1.0, 2, 3], [1, 2, 3], [5, 5, 5]])
    small_GM = torch.tensor([[11.0, 13, 12], [1, 3, 3], [5, 5, 8]])
    found = order_changes(small_GM, whole_GM)
    assert found["defined"] == 2
    assert found["rank_correlation"] == pytest.approx((0.5 + 1.5 / 3**0.5) / 2)
    # of nine pairs
    assert found["exchanged"] == pytest.approx(1 / 9)
    assert found["lost"] == pytest.approx(1 / 9)
    assert found["made"] == pytest.approx(2 / 9)
    assert found["tied"] == pytest.approx(3 / 9)
    # about the means: (-1 0 1) (-1 1 0); (-1 0 1) (-4 2 2) / 3; (0 0 0) (-1 -1 2): 1 + 2 of
    # |4|^(1/2) and |2 + 8/3 + 6|^(1/2)
    assert found["cosine"] == pytest.approx(3 / (4 * (2 + 8 / 3 + 6)) ** 0.5)


def test_the_same_rewards_change_no_order() -> None:
    draw = torch.Generator().manual_seed(0)
    reward_GM = torch.rand((4, 5), generator=draw)
    found = order_changes(2 * reward_GM + 1, reward_GM)
    assert found["rank_correlation"] == pytest.approx(1.0)
    assert found["cosine"] == pytest.approx(1.0)
    assert [found[name] for name in ("exchanged", "lost", "made", "tied")] == [0] * 4


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> WanGenerator:
    folder = build_tiny_wan(tmp_path_factory.mktemp("wan"), spatial=4, temporal=2)
    return WanGenerator.load(tiny_config(folder, num_frames=5), device="cpu")


@pytest.mark.slow
def test_training_brings_pixels_nearer_and_loads_as_the_option(
    generator: WanGenerator, tmp_path: Path
) -> None:
    """Plain colours, which a few steps learn; the folder then decodes for rewards."""
    draw = torch.Generator().manual_seed(0)
    clean = torch.randn((8, *generator.latent_shape), generator=draw)
    video = torch.full((8, 5, 32, 32, 3), 200, dtype=torch.uint8)
    decoder = new_decoder(generator, 0)
    before = error(decoder, clean, video)
    train(decoder, clean, video, Fit("decoder-0", 12, PEAK, tmp_path, every=12))
    after = error(decoder, clean, video)
    assert after < 0.7 * before
    assert not any(p.requires_grad for p in decoder.model.parameters())

    # As a run reads it.
    decoder.model.save_pretrained(tmp_path / "folder")
    cfg = replace(generator.cfg, scoring_decoder=str(tmp_path / "folder"))
    loaded = WanGenerator.load(cfg, device="cpu")
    assert torch.equal(loaded.decode_to_score(clean), decoder.decode(clean))

    # A second start goes on from the last saved state, which is the end.
    again = new_decoder(generator, 1)
    train(again, clean, video, Fit("decoder-0", 12, PEAK, tmp_path, every=12))
    assert torch.equal(again.decode(clean), decoder.decode(clean))


def error(decoder: ScoringDecoder, clean: torch.Tensor, video: torch.Tensor) -> float:
    """MEAN difference in levels of 255."""
    return float((decoder.decode(clean).float() - video.float()).abs().mean())


def test_seeds_are_other_decoders_and_fit_the_shapes_vae(
    generator: WanGenerator,
) -> None:
    """Latents of two frames beside each other; the config's generator is the embedded world's."""
    one, same, other = (new_decoder(generator, seed) for seed in (0, 0, 1))
    weights = [m.model.decoder.layers[0].weight for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].shape == (16, 32, 3, 3)
    assert one.window == 2
    assert load(GrpoRun, CONFIG).generator.path == "assets/shapes/anyflow"


class Decodes:
    """Videos that are the latents plus a shift, in levels; groups whose latents are given."""

    cfg = SimpleNamespace(fps=8.0)

    def __init__(self, shift: int) -> None:
        self.shift = shift

    def rollout(
        self, prompts: list[str], *, group_size: int, seeds: list[int]
    ) -> list[SimpleNamespace]:
        levels = torch.arange(1.0, len(prompts) * group_size + 1).view(-1, group_size)
        return [SimpleNamespace(clean_GCFHW=level[:, None]) for level in levels]

    def decode(self, clean: torch.Tensor) -> torch.Tensor:
        return (clean + self.shift).view(-1, 1, 1, 1, 1).expand(-1, 2, 4, 4, 3)


class Level:
    """The level of a video as its reward, turned round above 100."""

    def score(
        self, video_BTYXC: torch.Tensor, prompts: list[str], *, fps: float
    ) -> Score:
        assert len(prompts) == len(video_BTYXC)
        level_B = video_BTYXC.flatten(1).float().mean(dim=1)
        return Score(torch.where(level_B > 100, -level_B, level_B), {})


def test_both_decoders_are_compared_with_the_vae(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two groups of eight, levels 1 to 16; the small decoder adds 100, bfloat16 adds 1."""
    monkeypatch.setattr(build_decoder, "ShapesOracle", Level)
    found = measure_groups(Decodes(0), Decodes(1), Decodes(100), seed=0, groups=2)
    assert found["small"]["levels"] == 100
    assert found["small"]["reward_vae"] == found["vae_bfloat16"]["reward_vae"] == 8.5
    assert found["small"]["reward"] == -108.5
    assert found["small"]["rank_correlation"] == pytest.approx(-1)
    assert found["small"]["exchanged"] == 1
    assert found["vae_bfloat16"]["levels"] == 1
    assert found["vae_bfloat16"]["reward"] == 9.5
    assert found["vae_bfloat16"]["rank_correlation"] == pytest.approx(1)
