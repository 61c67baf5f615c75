"""Every attention backend that this machine has computes what plain attention computes."""

from __future__ import annotations

import pytest
import torch

from generator.attention import backend, require_backend
from generator.config import FORWARD_ONLY_ATTENTION, TRAINABLE_ATTENTION

# What int8 scores may differ by.
EXACT = 2e-2
INT8 = 1e-1
# Words of errors about a device without the kernel.
NO_KERNEL = ("No viable backend", "No available kernel", "not supported", "sm_", "SM")


@pytest.fixture(scope="module")
def transformer(device: torch.device) -> torch.nn.Module:
    """A Wan of two blocks with the head dimension of the published ones, in bfloat16."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=128,
        text_dim=64,
        ffn_dim=256,
        num_layers=2,
    )
    torch.nn.init.normal_(model.proj_out.weight, std=0.05)
    return model.eval().to(device, torch.bfloat16)


def forward(model: torch.nn.Module, *, gradient: bool) -> torch.Tensor:
    """The output for a random latent, or its gradient at the first block's query weights."""
    device = model.patch_embedding.weight.device
    source = torch.Generator().manual_seed(1)
    latent = torch.randn((1, 16, 3, 16, 16), generator=source)
    text = torch.randn((1, 32, 64), generator=source)
    with torch.set_grad_enabled(gradient):
        out = model(
            hidden_states=latent.to(device, torch.bfloat16),
            timestep=torch.full((1,), 500.0, device=device),
            encoder_hidden_states=text.to(device, torch.bfloat16),
            return_dict=False,
        )[0]
    if not gradient:
        return out.float().cpu()
    weight = model.blocks[0].attn1.to_q.weight
    return torch.autograd.grad(out.float().square().mean(), weight)[0].float().cpu()


def usable(name: str, device: torch.device) -> None:
    """Skip a backend that this machine lacks."""
    try:
        require_backend("attention", name, device)
    except (ValueError, OSError) as error:
        pytest.skip(str(error).splitlines()[0])


def forward_by(name: str, model: torch.nn.Module, *, gradient: bool) -> torch.Tensor:
    """`forward` by a backend; skips one that is installed and has no kernel for this GPU."""
    try:
        with backend(model, name):
            return forward(model, gradient=gradient)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        text = str(error)
        if any(words in text for words in NO_KERNEL):
            pytest.skip(text.splitlines()[0])
        raise


def distance(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", TRAINABLE_ATTENTION)
def test_backend_gives_the_output_and_gradient_of_plain_attention(
    transformer: torch.nn.Module, device: torch.device, name: str
) -> None:
    usable(name, device)
    for gradient in (False, True):
        with backend(transformer, "_native_math"):
            wanted = forward(transformer, gradient=gradient)
        ours = forward_by(name, transformer, gradient=gradient)
        assert distance(ours, wanted) < EXACT


@pytest.mark.parametrize("name", FORWARD_ONLY_ATTENTION)
def test_forward_only_backend_gives_the_output_of_plain_attention(
    transformer: torch.nn.Module, device: torch.device, name: str
) -> None:
    usable(name, device)
    with backend(transformer, "_native_math"):
        wanted = forward(transformer, gradient=False)
    ours = forward_by(name, transformer, gradient=False)
    assert distance(ours, wanted) < (INT8 if "sage" in name else EXACT)
