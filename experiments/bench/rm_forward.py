"""Measure what a shared forward for both objectives of dual RL saves.

    python experiments/bench/rm_forward.py

Three ways give the gradients of policy and head for G CoTs about each video:

    two     two forwards of every CoT, with `<Reward>` and without (the official release)
    one     one forward of every CoT, each with its prompt and video
    packed  one forward of all G CoTs behind a single prompt (`rm.dual_rl`)

Seconds are medians of alternating rounds, in fp32. The tests in tests/rm/test_packed.py compare the
gradients.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from experiments.bench.bench_io import bench_parser, median_seconds, write_record
from launch.compose import quiet
from rm.config import BackboneLora, LearningRates
from rm.model import DeScore
from rm.packed import PackedCot, pack, packed_forward, token_log_probs
from rm.prompt import Encoded
from rm.video import PreparedVideo, prepare
from toy.world import FPS, caption, random_scenes, render


@dataclass(frozen=True)
class DualBatch:
    """Videos with G CoTs about each, and the weight of every CoT in the objective."""

    model: DeScore
    encoded: list[Encoded]
    videos: list[PreparedVideo]
    cots: list[list[PackedCot]]
    weight_BG: Tensor

    def repeat(self) -> DualBatch:
        """Give every CoT a row with its prompt and video."""
        size = len(self.cots[0])
        cots = [[cot] for group in self.cots for cot in group]
        return DualBatch(
            self.model,
            [row for row in self.encoded for _ in range(size)],
            [row for row in self.videos for _ in range(size)],
            cots,
            self.weight_BG.reshape(-1, 1),
        )


def make_batch(
    base: str,
    *,
    videos: int,
    group_size: int,
    tokens: int,
) -> DualBatch:
    """Render videos of the embedded world and draw random CoTs about them."""
    # The language model gets an adapter, the vision tower is frozen.
    model = DeScore.from_base(base)
    model.param_groups(
        LearningRates(llm=1e-4, vision=0.0, merger=0.0),
        lora=BackboneLora(16, 32.0, 0.0),
        weight_decay=0.0,
    )

    # Render and encode the videos.
    rng = random.Random(0)
    scenes = random_scenes(videos, rng)
    prepared = []
    encoded = []
    for scene, frames in zip(scenes, render(scenes, frames=8), strict=True):
        video = prepare(frames, model.settings, fps=FPS)
        prompt = caption(scene.attributes, wording=0)
        prepared.append(video)
        encoded.append(model.encode(prompt, video))

    # Draw CoTs of 3/4 to all of the length, from ids that may be sampled.
    banned = model.banned_ids()
    banned[model.end_id] = True
    allowed = [token for token in range(200) if not banned[token]]
    cots = []
    for _ in range(videos):
        group = []
        for _ in range(group_size):
            length = tokens - rng.randrange(tokens // 4)
            ids = [rng.choice(allowed) for _ in range(length)]
            group.append(PackedCot(tuple(ids), finished=True))
        cots.append(group)

    # Weights of the CoTs, a part of the objective.
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(videos, group_size, generator=draw)
    return DualBatch(model, encoded, prepared, cots, weight)


def packed_objective(batch: DualBatch) -> Tensor:
    """SUM over CoTs of weight (log-prob + reward), by a forward for each row of the batch."""
    packed = pack(batch.model, batch.encoded, batch.videos, batch.cots)

    # Both terms come from the same forward.
    output = packed_forward(batch.model, packed, temperature=1.0)
    log_prob_BG = output.log_prob_BGT.sum(-1)
    reward_BG = output.reward_BGK[..., 0]
    return (batch.weight_BG * (log_prob_BG + reward_BG)).sum()


def single_objective(batch: DualBatch) -> Tensor:
    """Compute the objective by a forward for each CoT."""
    return packed_objective(batch.repeat())


def double_objective(batch: DualBatch) -> Tensor:
    """Compute the objective by two forwards for each CoT, with the query token and without."""
    model = batch.model
    rows = batch.repeat()
    sequences = []
    for prompt, cots in zip(rows.encoded, rows.cots, strict=True):
        sequences.append(Encoded(prompt.prompt_ids, cots[0].ids))

    # Rewards need the query token, log-probs do not.
    with_query = model.batch(sequences, rows.videos)
    reward_N1 = model(with_query)
    without_query = model.batch(sequences, rows.videos, query=False)
    hidden_NLD = model.hidden(without_query)

    # Collect the hidden states before the tokens, the tokens, and the weights of their CoTs.
    hidden = []
    targets = []
    weights = []
    for index, sequence in enumerate(sequences):
        start = len(sequence.prompt_ids) - 1
        end = len(sequence.ids)
        hidden.append(hidden_NLD[index, start:end])
        targets += [*sequence.cot_ids, model.end_id]
        weights.append(rows.weight_BG[index].expand(end - start))
    log_prob = token_log_probs(
        model,
        torch.cat(hidden),
        torch.tensor(targets),
        temperature=1.0,
    )
    log_prob_sum = (torch.cat(weights) * log_prob).sum()
    return log_prob_sum + (rows.weight_BG * reward_N1).sum()


# By their names in the JSON file.
OBJECTIVES = {
    "two": double_objective,
    "one": single_objective,
    "packed": packed_objective,
}


def gradients(name: str, batch: DualBatch) -> None:
    """Compute the gradients of an objective for all trained parameters."""
    objective = OBJECTIVES[name](batch)
    trained = [p for p in batch.model.parameters() if p.requires_grad]
    torch.autograd.grad(objective, trained)


def main() -> None:
    """Time the three ways and write the JSON."""
    parser = bench_parser(__doc__, "rm_forward")
    parser.add_argument("--base", default="assets/shapes/qwen")
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    quiet()
    batch = make_batch(
        args.base,
        videos=args.videos,
        group_size=args.group_size,
        tokens=args.tokens,
    )
    functions = {name: partial(gradients, name, batch) for name in OBJECTIVES}
    seconds = median_seconds(functions, args.rounds)
    record = {
        "prompt_tokens": len(batch.encoded[0].prompt_ids),
        "chain_tokens": args.tokens,
        "group_size": args.group_size,
        "seconds": seconds,
        "ratio_to_two": {
            name: seconds[name] / seconds["two"] for name in ("one", "packed")
        },
    }
    write_record(args.out, record)


if __name__ == "__main__":
    main()
