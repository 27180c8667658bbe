"""The module that is trained, on tiny real U-Nets: what learns, what is kept, where training starts."""

import pytest
import torch
from tiny_diffusers import random_unet, sdxl_unet

from dreamcache_core import InputError, MismatchError, ReferenceUse, inject
from dreamcache_core.method.adapter import ReferenceAdapter
from dreamcache_core.training.initialisation import new_adapters
from dreamcache_core.training.injected_unet import InjectedUNet
from dreamcache_core.training.plan import SavedBytes, estimate_saved_bytes

pytestmark = pytest.mark.diffusers

TOKENS = 77


def setting(sdxl=False, init="paper", batch=2):
    """A module, and arguments of its capture and its forward pass; nothing is square or of equal size."""
    unet = sdxl_unet() if sdxl else random_unet(48)
    module = InjectedUNet(unet, new_adapters(unet, init=init, seed=3))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    text = draw(batch, TOKENS, 2048 if sdxl else 48)
    added = {"text_embeds": draw(batch, 32), "time_ids": torch.full((batch, 6), 128.0)}
    kwargs = {"added_cond_kwargs": added} if sdxl else {}
    capture = (draw(batch, 4, 16, 16), torch.zeros_like(text), kwargs)
    timesteps = torch.tensor([981, 3])[:batch]
    return module, capture, (draw(batch, 4, 24, 16), timesteps, text, kwargs)


@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_only_adapters_learn_and_the_base_model_stays_as_it_is(sdxl, is_checkpointed):
    module, capture, args = setting(sdxl)
    before = {name: weight.clone() for name, weight in module.unet.state_dict().items()}
    if is_checkpointed:
        module.unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    with module.until_backward():
        module(module.capture(*capture), *args).square().mean().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    assert len(gradients) == 9 * len(module.adapters)
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients.values())
    assert all(parameter.grad is None for parameter in module.unet.parameters())
    optimizer.step()
    after = module.unet.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for is_checkpointed in (False, True):
        module, capture, args = setting()
        if is_checkpointed:
            module.unet.enable_gradient_checkpointing()
        with module.until_backward():
            module(module.capture(*capture), *args).square().mean().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-7)


def test_the_frozen_encoder_half_builds_no_graph():
    module, capture, args = setting()
    needs_grad = {}
    hooks = [
        block.register_forward_hook(
            lambda _, __, output, name=name: needs_grad.update({name: output[0].requires_grad})
        )
        for name, block in module.unet.named_modules()
        if name in ("down_blocks.0", "down_blocks.3", "mid_block.resnets.0", "up_blocks.0")
    ]
    with module.until_backward():
        module(module.capture(*capture), *args)
    for hook in hooks:
        hook.remove()
    assert needs_grad == {
        "down_blocks.0": False,
        "down_blocks.3": False,
        "mid_block.resnets.0": False,
        "up_blocks.0": True,
    }


def test_a_graph_in_the_encoder_half_would_cost_memory():
    kept = {}
    for has_graph in (False, True):
        module, capture, (noised, *rest) = setting()
        reference = module.capture(*capture)
        saved = SavedBytes([*module.unet.parameters(), *module.parameters()])
        with module.until_backward(), saved.counting():
            module(reference, noised.requires_grad_(has_graph), *rest)
        kept[has_graph] = saved.total
    assert kept[False] < 0.75 * kept[True]


@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_memory_is_foretold_exactly_but_for_temporary_buffers(sdxl, is_checkpointed):
    module, capture, args = setting(sdxl)
    if is_checkpointed:
        module.unet.enable_gradient_checkpointing()
    reference = module.capture(*capture)
    saved = SavedBytes([*module.unet.parameters(), *module.parameters()])
    with module.until_backward(), saved.counting():
        module(reference, *args)
    estimate = estimate_saved_bytes(
        module,
        batch_size=2,
        target_px=(192, 128),
        reference_px=128,
        dtype=torch.float32,
        is_checkpointed=is_checkpointed,
    )
    assert estimate == pytest.approx(saved.total, rel=0.02)


def test_rows_see_their_own_reference_alone():
    module, (noised, text, kwargs), args = setting()
    with torch.no_grad(), module.until_backward():
        both = module(module.capture(noised, text, kwargs), *args)
        other = noised.clone()
        other[1] += 1
        changed = module(module.capture(other, text, kwargs), *args)
    torch.testing.assert_close(both[0], changed[0])
    assert not torch.allclose(both[1], changed[1], atol=1e-3)


def test_forward_equals_the_unet_with_the_adapters_injected():
    module, capture, (noised, timesteps, text, kwargs) = setting()
    reference = module.capture(*capture)
    with torch.no_grad(), module.until_backward():
        trained = module(reference, noised, timesteps, text, kwargs)
    use = ReferenceUse(reference, module.adapters.fuse(), per_row=True)
    with torch.no_grad(), inject(module.unet, use):
        generated = module.unet(noised, timesteps, text).sample
    torch.testing.assert_close(trained, generated, rtol=1e-4, atol=1e-5)


def test_nothing_is_left_in_the_unet_after_backward_or_an_error():
    module, capture, (noised, timesteps, text, kwargs) = setting()
    reference = module.capture(*capture)
    with module.until_backward(), pytest.raises(RuntimeError):
        module(reference, noised[:, :3], timesteps, text, kwargs)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.unet.modules())


def test_training_starts_at_the_plain_unet_but_with_paper():
    predictions = {}
    for init in ("identity", "sum", "paper"):
        module, capture, (noised, timesteps, text, kwargs) = setting(init=init)
        with torch.no_grad(), module.until_backward():
            predictions[init] = module(module.capture(*capture), noised, timesteps, text, kwargs)
    with torch.no_grad():
        plain = module.unet(noised, timesteps, text).sample
    torch.testing.assert_close(predictions["identity"], plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(predictions["sum"], plain, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(predictions["paper"], plain, atol=1e-2)


def test_sum_adds_what_is_attended_and_leaves_that_untrained():
    module, capture, (noised, timesteps, text, kwargs) = setting(init="sum")
    with module.until_backward():
        module(module.capture(*capture), noised, timesteps, text, kwargs).square().mean().backward()
    adapter = module.adapters["middle_block.1"]
    assert isinstance(adapter, ReferenceAdapter)
    assert adapter.merge.weight.grad is None
    assert adapter.to_out.weight.grad is not None
    attention, attended = torch.randn(2, 1, 3, adapter.channels)
    expected = attention + adapter.to_out(attended)
    torch.testing.assert_close(adapter.merge_attention(attention, attended), expected)


def test_new_adapters_depend_on_their_seed_and_on_nothing_else():
    unet = random_unet(48)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second, other = (new_adapters(unet, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [adapters["middle_block.1"].to_q.weight for adapters in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("wrong", [{"init": "zero"}, {"timestep": 1000}, {"timestep": 1.0}])
def test_unknown_start_values_are_refused(wrong):
    with pytest.raises(InputError, match="must be"):
        new_adapters(random_unet(48), **wrong)


def test_adapters_of_another_model_are_refused():
    with pytest.raises(MismatchError, match="48"):
        InjectedUNet(random_unet(48), new_adapters(random_unet(64)))
