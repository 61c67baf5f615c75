"""Generation with a KV cache against plain full forwards, and `<Reward>` on the same cache."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from common.distributed import derive_seed
from rm.config import Generation
from rm.generate import _TokenSampler, extend, generate, rewards_from_cache
from rm.model import DeScore
from rm.prompt import Encoded
from rm.video import prepare
from tests.tiny_qwen import (
    SETTINGS,
    TEMPLATE,
    random_frames,
    speak_plainly,
    tiny_qwen,
    tiny_tokenizer,
)

GREEDY = Generation(max_new_tokens=6, repetition_penalty=1.0)
SAMPLED = Generation(max_new_tokens=12, temperature=2.0, repetition_penalty=1.0)
PROMPTS = ["a", "a red ball moves left", "two cats", "x" * 40, "a", "blue"]


def judge() -> DeScore:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return DeScore(
            tiny_qwen(layers=3), tiny_tokenizer(), TEMPLATE, SETTINGS, query_id=264
        ).eval()


@pytest.fixture(scope="module")
def model():
    return judge()


@pytest.fixture(scope="module")
def speaker():
    """The same weights; its chains end by themselves."""
    model = judge()
    speak_plainly(model.backbone)
    return model


@pytest.fixture(scope="module")
def videos():
    return [
        prepare(random_frames(i, frames=4 + i), SETTINGS, fps=4.0)
        for i in range(len(PROMPTS))
    ]


@pytest.fixture(scope="module")
def encoded(model, videos):
    return [
        model.encode(prompt, video)
        for prompt, video in zip(PROMPTS, videos, strict=True)
    ]


@pytest.fixture(scope="module")
def chains(speaker, encoded, videos):
    return generate(
        speaker, speaker.batch(encoded, videos, query=False), SAMPLED, seeds=range(6)
    )


def full_forward(model, encoded, videos, chains) -> torch.Tensor:
    finished = [
        Encoded(item.prompt_ids, tuple(chains.ids(row)))
        for row, item in enumerate(encoded)
    ]
    with torch.no_grad():
        return model(model.batch(finished, videos))


def test_reward_on_the_cache_is_the_reward_of_the_full_forward(
    speaker, encoded, videos
):
    chains = generate(
        speaker, speaker.batch(encoded, videos, query=False), SAMPLED, seeds=range(6)
    )
    lengths = chains.length_B.tolist()
    assert len(set(lengths)) > 2  # rows stop at different steps,
    assert chains.finished_B.any()
    assert not chains.finished_B.all()  # and some not at all
    want = full_forward(speaker, encoded, videos, chains)
    torch.testing.assert_close(
        rewards_from_cache(speaker, chains), want, atol=1e-5, rtol=0
    )
    assert want.std() > 1e-3


def test_a_sharded_model_goes_on_until_the_last_rank_stops(
    speaker, encoded, videos, monkeypatch
):
    """Ten more forwards than its own chains need, and nothing else."""
    batch = speaker.batch(encoded[:2], videos[:2], query=False)
    how = Generation(max_new_tokens=40, temperature=2.0, repetition_penalty=1.0)
    alone = generate(speaker, batch, how, seeds=range(2))
    assert alone.finished_B.all()
    longest = int(alone.length_B.max())
    steps = []
    monkeypatch.setattr(
        "rm.generate.any_rank",
        lambda alive_B: len(steps.append(1) or steps) <= longest + 10,
    )
    monkeypatch.setattr(speaker, "sharded", True, raising=False)
    fed = []
    language_model = speaker.backbone.model.language_model
    with language_model.register_forward_pre_hook(lambda *_: fed.append(1)):
        together = generate(speaker, batch, how, seeds=range(2))
    assert len(fed) == 1 + longest + 10
    assert torch.equal(together.mask_BK, alone.mask_BK)
    assert torch.equal(together.token_BL, alone.token_BL)
    assert torch.equal(together.length_B, alone.length_B)
    assert torch.equal(together.finished_B, alone.finished_B)
    torch.testing.assert_close(
        rewards_from_cache(speaker, together),
        rewards_from_cache(speaker, alone),
        atol=1e-6,
        rtol=0,
    )


@torch.no_grad()
def test_greedy_tokens_are_those_of_forwards_without_a_cache(model, encoded, videos):
    chains = generate(model, model.batch(encoded, videos, query=False), GREEDY)
    banned = model.banned_ids()
    for row in (0, 3, 5):
        ids: list[int] = []
        for _ in range(GREEDY.max_new_tokens):
            item = Encoded(encoded[row].prompt_ids, tuple(ids))
            hidden = model.hidden(
                model.batch([item], videos[row : row + 1], query=False)
            )[0, -1]
            ids.append(
                int(
                    model.backbone.lm_head(hidden)
                    .masked_fill(banned, -math.inf)
                    .argmax()
                )
            )
        assert chains.ids(row) == ids


def test_batch_size_changes_no_row(speaker, encoded, videos, chains):
    for row in range(6):
        batch = speaker.batch(
            encoded[row : row + 1], videos[row : row + 1], query=False
        )
        alone = generate(speaker, batch, SAMPLED, seeds=[row])
        assert alone.ids(0) == chains.ids(row)
        assert alone.finished_B[0] == chains.finished_B[row]


@pytest.mark.parametrize(
    "how",
    [
        SAMPLED,
        Generation(max_new_tokens=12, temperature=0.0, repetition_penalty=1.0),
        Generation(max_new_tokens=12, temperature=2.0, repetition_penalty=1.3),
    ],
    ids=["sampled", "greedy", "penalty"],
)
def test_extend_equals_a_generation_with_the_larger_limit(
    speaker, encoded, videos, how
):
    """Tokens to the bit, rewards to rounding, whichever rows go on and in whichever order."""
    seeds = list(range(6)) if how.temperature > 0 else None
    batch = speaker.batch(encoded, videos, query=False)
    whole = generate(speaker, batch, how, seeds=seeds)
    rewards = rewards_from_cache(speaker, whole)
    cut = generate(speaker, batch, replace(how, max_new_tokens=4), seeds=seeds)
    rows = (~cut.finished_B).nonzero().squeeze(1).tolist()[::-1]
    assert rows
    longer = extend(
        speaker, cut, rows, how, seeds=seeds and [seeds[row] for row in rows]
    )
    for n, row in enumerate(rows):
        assert longer.cot(n) == whole.cot(row)
    torch.testing.assert_close(
        rewards_from_cache(speaker, longer), rewards[rows], atol=1e-5, rtol=0
    )


def test_rewards_from_the_cache_may_be_read_twice(speaker, encoded, videos):
    batch = speaker.batch(encoded, videos, query=False)
    cots = generate(speaker, batch, SAMPLED, seeds=range(6))
    first = rewards_from_cache(speaker, cots)
    assert torch.equal(first, rewards_from_cache(speaker, cots))


def test_cot_ends_at_the_end_of_turn(model, chains):
    for row in range(len(PROMPTS)):
        ids = chains.ids(row)
        assert model.end_id not in ids
        assert len(ids) == chains.length_B[row]
        assert chains.finished_B[row] == (len(ids) < SAMPLED.max_new_tokens)
        assert set(chains.token_BL[row, len(ids) :].tolist()) <= {model.pad_id}


def test_vision_once_vocabulary_once_a_token_query_one_token(
    model, encoded, videos, monkeypatch
):
    counts = {"visual": 0, "lm_head": 0, "llm": []}
    backbone = model.backbone
    handles = [
        backbone.model.visual.register_forward_hook(
            lambda *_: counts.update(visual=counts["visual"] + 1)
        ),
        backbone.lm_head.register_forward_hook(
            lambda module, args, out: counts.update(
                lm_head=counts["lm_head"] + args[0].shape[0]
            )
        ),
        backbone.model.language_model.norm.register_forward_hook(
            lambda module, args, out: counts["llm"].append(args[0].shape[1])
        ),
    ]
    try:
        batch = model.batch(encoded, videos, query=False)
        chains = generate(model, batch, GREEDY)
        rewards_from_cache(model, chains)
    finally:
        for handle in handles:
            handle.remove()
    assert counts["visual"] == 1
    assert (
        counts["lm_head"] == 6 * GREEDY.max_new_tokens
    )  # rows x tokens, of the prompt only the last position
    assert counts["llm"] == [batch.ids_BL.shape[1]] + [1] * GREEDY.max_new_tokens + [1]


def test_banned_ids_are_never_chosen(model, encoded, videos):
    how = Generation(
        max_new_tokens=60, temperature=1e4, repetition_penalty=1.0
    )  # uniform over what is allowed
    config = model.backbone.config
    banned = {*range(264, 320), config.video_token_id, config.image_token_id}
    assert set(model.banned_ids().nonzero().squeeze(1).tolist()) == banned
    chains = generate(
        model, model.batch(encoded, videos, query=False), how, seeds=range(6)
    )
    found = {token for row in range(6) for token in chains.ids(row)}
    assert not banned & found
    assert len(found) > 100


def choose(
    model, logits_V: list[float], how: Generation, *, prompt: list[int], seeds=None
) -> torch.Tensor:
    rows = 1 if seeds is None else len(seeds)
    logits = torch.full((rows, 320), -50.0)
    logits[:, : len(logits_V)] = torch.tensor(logits_V)
    sampler = _TokenSampler(model, torch.tensor([prompt] * rows), how, seeds)
    return sampler(logits, torch.tensor([0]))


def test_sampling_follows_the_softmax(model):
    how = Generation(max_new_tokens=1, temperature=2.0, repetition_penalty=1.0)
    # logits 0, 2 log 2, 2 log 5 at temperature 2: probabilities 1/8, 2/8, 5/8
    chosen = choose(
        model,
        [0.0, 2 * math.log(2), 2 * math.log(5)],
        how,
        prompt=[9],
        seeds=range(4000),
    )
    share = torch.bincount(chosen, minlength=3)[:3] / 4000
    assert share.tolist() == pytest.approx(
        [0.125, 0.25, 0.625], abs=0.03
    )  # four standard deviations


def test_draw_of_zero_skips_zero_probability_ids(model):
    how = Generation(max_new_tokens=1, temperature=1.0, repetition_penalty=1.0)
    chooser = _TokenSampler(model, torch.tensor([[9]]), how, [0])
    chooser.uniform_BS.zero_()
    logits = torch.zeros(1, 320)
    logits[0, :3] = -math.inf
    assert int(chooser(logits, torch.tensor([0]))) == 3
    chooser.uniform_BS.fill_(
        1 - 2.0**-53
    )  # the largest draw there is: the last id that is not banned
    allowed = (~model.banned_ids()).nonzero().squeeze(1)
    assert int(chooser(logits, torch.tensor([0]))) == allowed[-1]


def test_draws_depend_on_the_seed_of_the_row_alone(model):
    how = Generation(max_new_tokens=1, temperature=1.0, repetition_penalty=1.0)
    seeds = [derive_seed("row", i) for i in range(50)]
    together = choose(model, [0.0] * 200, how, prompt=[9], seeds=seeds)
    backwards = choose(model, [0.0] * 200, how, prompt=[9], seeds=seeds[::-1])
    assert torch.equal(together, backwards.flip(0))
    assert len(set(together.tolist())) > 20


@pytest.mark.parametrize(
    ("logits", "prompt", "want"),
    [
        ([2.0, 1.9], [0], 1),  # 2 / 1.1 = 1.82 < 1.9
        ([2.0, 1.8], [0], 0),  # 1.82 > 1.8
        ([-1.0, -1.05], [0], 1),  # -1 * 1.1 < -1.05
        ([2.0, 1.9], [0, 1], 0),  # both were seen
    ],
)
def test_repetition_penalty_by_hand(model, logits, prompt, want):
    how = Generation(max_new_tokens=1, repetition_penalty=1.1)
    assert int(choose(model, logits, how, prompt=prompt)) == want


def test_repetition_penalty_counts_new_tokens(model):
    chooser = _TokenSampler(
        model,
        torch.tensor([[9]]),
        Generation(max_new_tokens=2, repetition_penalty=1.1),
        None,
    )
    logits = torch.full((1, 320), -50.0)
    logits[0, :2] = torch.tensor([2.0, 1.9])
    assert [int(chooser(logits, torch.tensor([step]))) for step in range(2)] == [0, 1]


def test_seeds_go_with_a_temperature(model, encoded, videos):
    batch = model.batch(encoded, videos, query=False)
    for how, seeds in ((GREEDY, [1] * 6), (SAMPLED, None)):
        with pytest.raises(ValueError, match="temperature"):
            generate(model, batch, how, seeds=seeds)
