"""Sampling with a merged adapter: the same numbers, the same gradients, the same base."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.gaussian import log_prob
from common.lora import adapter_layers
from common.types import Group
from generator import adapter
from generator.config import LoraConfig
from generator.merged import MergedAdapter, merged_weight
from generator.wan import WanGenerator
from tests.tiny import tiny_config, tiny_generator

PROMPT = "a red circle"


def generator_of(
    folder: Path, *, sampler: dict[str, object], **changes: object
) -> WanGenerator:
    """As if trained, with these settings of the sampler."""
    chosen = dataclasses.replace(tiny_config(folder).sampler, **sampler)
    return tiny_generator(folder, sampler=chosen, **changes)


@pytest.fixture(scope="module")
def plain(folder: Path) -> WanGenerator:
    return generator_of(folder, sampler={})


@pytest.fixture(scope="module")
def merging(folder: Path) -> WanGenerator:
    return generator_of(folder, sampler={"merge_adapter": True})


@pytest.fixture
def products(merging: WanGenerator) -> Iterator[list[int]]:
    """Grows by one at every product with an A matrix."""
    seen: list[int] = []
    hooks = [
        layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
        for layer in adapter_layers(merging.module)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def state_of(generator: WanGenerator) -> dict[str, Tensor]:
    """A copy of every weight."""
    return {
        name: tensor.clone() for name, tensor in generator.module.state_dict().items()
    }


def one_group(generator: WanGenerator, seed: int = 3) -> Group:
    return generator.rollout([PROMPT], group_size=4, seeds=[seed])[0]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


# ---- the merged weight ----


def test_merged_weight_by_hand() -> None:
    """W = [[1, 2], [3, 4]], alpha / rank = 3, B A = [[1, 1], [2, 2]]: W + 3 B A."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    import peft

    model = peft.get_peft_model(
        model, peft.LoraConfig(r=1, lora_alpha=3, target_modules=["0"])
    )
    (layer,) = adapter_layers(model)
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.lora_A["default"].weight.copy_(torch.tensor([[1.0, 1.0]]))
        layer.lora_B["default"].weight.copy_(torch.tensor([[1.0], [2.0]]))
    assert merged_weight(layer).tolist() == [[4.0, 5.0], [9.0, 10.0]]


def test_merged_weight_is_rounded_once(folder: Path) -> None:
    """The nearest bf16 of the sum in fp64: at most half a unit in the last place away."""
    generator = generator_of(folder, sampler={}, dtype="bfloat16")
    for layer in adapter_layers(generator.module):
        base = layer.base_layer.weight
        exact = base.double() + layer.scaling["default"] * (
            layer.lora_B["default"].weight.double()
            @ layer.lora_A["default"].weight.double()
        )
        merged = merged_weight(layer)
        assert merged.dtype == torch.bfloat16
        # bf16 keeps 8 bits of a number
        assert ((merged.double() - exact).abs() <= exact.abs() * 2.0**-8).all()
        assert not torch.equal(merged, base)


def test_weight_that_zero3_split_raises(merging: WanGenerator) -> None:
    layer = adapter_layers(merging.module)[0]
    layer.base_layer.weight.ds_id = 0
    try:
        with pytest.raises(ValueError, match="zero_stage 3"):
            one_group(merging)
    finally:
        del layer.base_layer.weight.ds_id


# ---- what sampling computes ----


def test_merged_rollout_equals_the_plain_one(
    plain: WanGenerator, merging: WanGenerator
) -> None:
    for seed in (1, 2, 3, 4):
        want, got = one_group(plain, seed), one_group(merging, seed)
        assert relative(got.clean_GCFHW, want.clean_GCFHW) < 1e-5
        assert relative(got.steps[0].next_GCFHW, want.steps[0].next_GCFHW) < 1e-5
    # not bit for bit: the merged weights were in use
    assert not torch.equal(got.clean_GCFHW, want.clean_GCFHW)


def test_merged_rollout_equals_the_plain_one_within_bf16(folder: Path) -> None:
    """Merging moves latents by about as much as bf16 itself does, not more than twice."""
    exact = one_group(generator_of(folder, sampler={})).clean_GCFHW
    half = one_group(generator_of(folder, sampler={}, dtype="bfloat16")).clean_GCFHW
    merged = one_group(
        generator_of(folder, sampler={"merge_adapter": True}, dtype="bfloat16")
    ).clean_GCFHW
    assert relative(merged, exact) < 2 * relative(half, exact)


def test_merged_evaluation_equals_the_plain_one(
    plain: WanGenerator, merging: WanGenerator
) -> None:
    for scheduler in ("euler", "pipeline"):
        want = plain.sample([PROMPT, "rain"], [1, 2], scheduler=scheduler)
        got = merging.sample([PROMPT, "rain"], [1, 2], scheduler=scheduler)
        assert relative(got, want) < 1e-5
        assert not torch.equal(got, want)


def test_only_the_stochastic_step_multiplies_by_the_adapter(
    merging: WanGenerator, products: list[int]
) -> None:
    one_group(merging)
    # a single guided call of the module
    assert len(products) == len(adapter_layers(merging.module))
    products.clear()
    merging.sample([PROMPT], [1])
    assert not products


def test_first_ratio_of_a_merging_sampler_is_one(merging: WanGenerator) -> None:
    group = one_group(merging)
    law = merging.transition(group.prompt, group.steps[0])
    got = log_prob(law, group.steps[0].next_GCFHW).detach()
    assert torch.equal(got, group.steps[0].log_prob_G)


def test_reference_is_never_merged(
    folder: Path, plain: WanGenerator, merging: WanGenerator
) -> None:
    base = WanGenerator.load(tiny_config(folder), device="cpu").sample([PROMPT], [1])
    with merging.reference():
        assert torch.equal(merging.sample([PROMPT], [1]), base)
    with plain.reference():
        assert torch.equal(plain.sample([PROMPT], [1]), base)


def test_adapter_that_changed_is_merged_anew(folder: Path) -> None:
    generator = generator_of(folder, sampler={"merge_adapter": True})
    before = generator.sample([PROMPT], [1])
    with torch.no_grad():
        for layer in adapter_layers(generator.module):
            layer.lora_B["default"].weight.mul_(-1)
    after = generator.sample([PROMPT], [1])
    assert relative(after, before) > 0.01
    # the same change without merging
    generator._merged = None
    assert relative(generator.sample([PROMPT], [1]), after) < 1e-5


def test_merging_without_an_adapter_changes_nothing(folder: Path) -> None:
    want = generator_of(folder, sampler={}, lora=None).sample([PROMPT], [1])
    merging = generator_of(folder, sampler={"merge_adapter": True}, lora=None)
    assert torch.equal(merging.sample([PROMPT], [1]), want)


# ---- what training computes ----


def gradient_of(generator: WanGenerator, group: Group) -> Tensor:
    """Of MEAN over members of A_g log p_g."""
    advantage_G = torch.tensor([1.5, -0.5, 0.25, -1.25])
    law = generator.transition(group.prompt, group.steps[0])
    loss = (advantage_G * log_prob(law, group.steps[0].next_GCFHW)).mean()
    trained = [p for p in generator.module.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


@pytest.mark.parametrize(
    "sampler",
    [
        {"merge_adapter": True},
        {
            "merge_adapter": True,
            "tail_solver": "ab2",
            "tail_steps": 2,
            "attention": "_native_flash",
            "tail_attention": "_native_math",
        },
    ],
)
def test_fast_samplers_collapsed_gradient_is_the_plain_per_member_one(
    folder: Path, plain: WanGenerator, sampler: dict[str, object]
) -> None:
    """At the latents of the fast sampler: a forward for each member of an unmerged policy."""
    fast = generator_of(folder, sampler=sampler)
    group = one_group(fast)
    collapsed = gradient_of(fast, group)

    step = group.steps[0]
    advantage_G = [1.5, -0.5, 0.25, -1.25]
    trained = [p for p in plain.module.parameters() if p.requires_grad]
    total = torch.zeros_like(collapsed)
    for member, advantage in enumerate(advantage_G):
        law = plain.transition(group.prompt, step)
        own = log_prob(law, step.next_GCFHW[member : member + 1])[0]
        gradient = torch.autograd.grad(advantage * own / 4, trained)
        total += torch.cat([g.flatten() for g in gradient])
    assert total.norm() > 0
    assert relative(collapsed, total) < 1e-6


def test_gradient_through_a_merged_adapter_raises(merging: WanGenerator) -> None:
    x = torch.zeros(1, *merging.latent_shape)
    with merging._merged.held(), merging._merged.applied(), pytest.raises(RuntimeError):
        merging.velocity(x, torch.ones(1), [PROMPT], guidance_scale=1.0)


# ---- what stays as it was ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_bit_equal_after_100_merges(folder: Path, dtype: str) -> None:
    generator = generator_of(folder, sampler={}, dtype=dtype)
    before = state_of(generator)
    parameters = dict(generator.module.named_parameters())
    merged = MergedAdapter(generator.module)
    for _ in range(100):
        with merged.held(), merged.applied():
            layer = merged.layers[0]
            assert not torch.equal(
                layer.base_layer.weight,
                before["base_model.model.blocks.0.attn1.to_q.base_layer.weight"],
            )
    after = generator.module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    # the same objects: an optimizer or a hook that holds them still does
    assert all(
        parameter is parameters[name]
        for name, parameter in generator.module.named_parameters()
    )


def test_weights_are_bit_equal_after_an_error(merging: WanGenerator) -> None:
    before = state_of(merging)
    with pytest.raises(KeyError), merging._merged.held(), merging._merged.applied():
        raise KeyError
    after = merging.module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not merging._merged.copies
    assert not any(layer.disable_adapters for layer in adapter_layers(merging.module))


def test_saved_adapter_does_not_change_by_sampling(
    merging: WanGenerator, tmp_path: Path
) -> None:
    before = adapter.save(merging.module, tmp_path / "before").read_bytes()
    for seed in range(3):
        one_group(merging, seed)
        merging.sample([PROMPT], [seed])
    assert adapter.save(merging.module, tmp_path / "after").read_bytes() == before


def test_only_targets_are_copied(folder: Path) -> None:
    """Two blocks with 4 + 4 + 2 linear layers each would be 20; to_q alone is 4."""
    generator = generator_of(
        folder,
        sampler={"merge_adapter": True},
        lora=LoraConfig(rank=4, alpha=8.0, targets=("to_q",)),
    )
    merged = generator._merged
    with merged.held():
        assert [tuple(copy_OI.shape) for copy_OI in merged.copies] == [(24, 24)] * 4
    assert merged.copies == []


# ---- products in bf16 ----


def test_bf16_products_are_those_of_rounded_factors(folder: Path) -> None:
    """result + scaling B16 A16 x16, each factor and product rounded to bf16."""
    lora = LoraConfig(rank=4, alpha=8.0, compute_dtype="bfloat16")
    generator = generator_of(folder, sampler={}, lora=lora)
    layer = adapter_layers(generator.module)[0]
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    a = layer.lora_A["default"].weight.bfloat16()
    b = layer.lora_B["default"].weight.bfloat16()
    want = layer.base_layer(x) + (x.bfloat16() @ a.T @ b.T) * 2.0
    assert torch.equal(layer(x), want)


def test_bf16_products_keep_fp32_weights_and_gradients(
    folder: Path, plain: WanGenerator
) -> None:
    lora = LoraConfig(rank=4, alpha=8.0, compute_dtype="bfloat16")
    generator = generator_of(folder, sampler={}, lora=lora)
    names = [name for name, _ in generator.module.named_parameters()]
    assert names == [name for name, _ in plain.module.named_parameters()]
    group = one_group(plain)
    gradient = gradient_of(generator, group)
    want = gradient_of(plain, group)
    assert gradient.dtype == torch.float32
    assert 1e-6 < relative(gradient, want) < 0.03
    trained = [p for p in generator.module.parameters() if p.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}


def test_bf16_products_do_not_widen_activations(folder: Path) -> None:
    """A cast to fp32 and back would change no number, but move twice the bytes."""
    lora = LoraConfig(rank=4, alpha=8.0, compute_dtype="bfloat16")
    generator = generator_of(folder, sampler={}, lora=lora, dtype="bfloat16")
    seen: set[torch.dtype] = set()
    for layer in adapter_layers(generator.module):
        layer.lora_A["default"].register_forward_pre_hook(
            lambda _, inputs: seen.add(inputs[0].dtype)
        )
    generator.sample([PROMPT], [1])
    assert seen == {torch.bfloat16}


def test_bf16_products_sample_and_replay_alike(folder: Path) -> None:
    lora = LoraConfig(rank=4, alpha=8.0, compute_dtype="bfloat16")
    generator = generator_of(
        folder, sampler={"merge_adapter": True}, lora=lora, dtype="bfloat16"
    )
    group = one_group(generator)
    law = generator.transition(group.prompt, group.steps[0])
    got = log_prob(law, group.steps[0].next_GCFHW).detach()
    assert torch.equal(got, group.steps[0].log_prob_G)


def test_tf32_leaves_products_on_a_cpu_as_they_are(
    folder: Path, plain: WanGenerator
) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    want = plain.sample([PROMPT], [1])
    try:
        generator = generator_of(folder, sampler={}, tf32=True)
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.equal(generator.sample([PROMPT], [1]), want)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
