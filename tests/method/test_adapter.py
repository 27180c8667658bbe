"""One layer's adapter and the set of them: closed forms, fused against unfused, counts."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dreamcache_core.method.adapter import (
    AdapterInfo,
    AdapterSet,
    FusedAdapter,
    ReferenceAdapter,
    fused_weights,
    torch_attention,
)
from dreamcache_core.method.layers import Layout

BATCH, TOKENS, REFERENCE_TOKENS, CHANNELS, HEADS = 3, 10, 7, 24, 4
INFO = AdapterInfo(Layout(48, {"middle_block.1": 24, "output_blocks.4.1": 16}))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def adapter() -> ReferenceAdapter:
    adapter = ReferenceAdapter(CHANNELS)
    for seed, parameter in enumerate(adapter.parameters()):
        parameter.data = randn(*parameter.shape, seed=seed) / CHANNELS**0.5
    return adapter.requires_grad_(False)


@pytest.fixture
def states() -> tuple[Tensor, Tensor]:
    """Hidden states and self-attention output."""
    return randn(BATCH, TOKENS, CHANNELS, seed=50), randn(BATCH, TOKENS, CHANNELS, seed=51)


def reference(references: int = 1) -> Tensor:
    return randn(references, REFERENCE_TOKENS, CHANNELS, seed=52)


def by_hand(adapter: ReferenceAdapter, x: Tensor, own: Tensor, memory: Tensor) -> Tensor:
    """METHOD.md section 4, one head and one row at a time."""
    query, key, value = adapter.to_q(adapter.norm(x)), adapter.to_k(memory), adapter.to_v(memory)
    width, rows = CHANNELS // HEADS, list[Tensor]()
    for row in range(len(x)):
        source, heads = min(row, len(memory) - 1), list[Tensor]()
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            logits = query[row, :, part] @ key[source, :, part].T / width**0.5
            heads.append(logits.softmax(dim=-1) @ value[source, :, part])
        rows.append(torch.cat(heads, dim=-1))
    attended = adapter.to_out(torch.stack(rows))
    return adapter.merge(torch.cat([own, attended], dim=-1))


@pytest.mark.parametrize("references", [1, BATCH])
def test_adapter_computes_the_formula(adapter, states, references):
    memory = reference(references)
    out = adapter(*states, *adapter.project_reference(memory), heads=HEADS)
    torch.testing.assert_close(
        out, by_hand(adapter, states[0], states[1], memory), rtol=1e-5, atol=1e-5
    )


def test_identical_keys_give_the_mean_of_the_values(adapter, states):
    key = randn(1, 1, CHANNELS).expand(1, REFERENCE_TOKENS, CHANNELS)
    value = randn(1, REFERENCE_TOKENS, CHANNELS, seed=1)
    attended = adapter.attend(states[0], key, value, heads=HEADS)
    expected = value.mean(dim=1, keepdim=True).expand_as(attended)
    torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-6)


def test_zero_queries_give_the_mean_of_the_values(adapter, states):
    nn.init.zeros_(adapter.to_q.weight)
    key, value = adapter.project_reference(reference())
    attended = adapter.attend(states[0], key, value, heads=HEADS)
    torch.testing.assert_close(
        attended, value.mean(dim=1, keepdim=True).expand_as(attended), rtol=1e-5, atol=1e-6
    )


def test_merge_of_identity_and_zero_returns_the_self_attention(adapter, states):
    adapter.merge.weight[:] = torch.cat(
        [torch.eye(CHANNELS), torch.zeros(CHANNELS, CHANNELS)], dim=1
    )
    adapter.merge.bias.zero_()
    key, value = adapter.project_reference(reference())
    for form in (adapter, FusedAdapter(fused_weights(adapter), nn, torch.float32)):
        out = form(*states, key, value, heads=HEADS)
        torch.testing.assert_close(out, states[1], rtol=1e-6, atol=1e-6)


def test_merge_of_zero_and_identity_returns_what_was_attended_to(adapter, states):
    adapter.merge.weight[:] = torch.cat(
        [torch.zeros(CHANNELS, CHANNELS), torch.eye(CHANNELS)], dim=1
    )
    adapter.merge.bias.zero_()
    key, value = adapter.project_reference(reference())
    expected = adapter.to_out(adapter.attend(states[0], key, value, heads=HEADS))
    out = adapter(*states, key, value, heads=HEADS)
    torch.testing.assert_close(out, expected)


def test_order_of_reference_tokens_does_not_matter(adapter, states):
    memory = reference()
    turned = adapter.project_reference(memory.flip(1))
    out = adapter(*states, *adapter.project_reference(memory), heads=HEADS)
    torch.testing.assert_close(adapter(*states, *turned, heads=HEADS), out, rtol=1e-5, atol=1e-5)


def test_masked_keys_count_as_absent(adapter, states):
    memory = reference()
    mask = torch.zeros(1, 1, 1, REFERENCE_TOKENS)
    mask[..., 4:] = -torch.inf
    masked = adapter(*states, *adapter.project_reference(memory), heads=HEADS, key_mask=mask)
    absent = adapter(*states, *adapter.project_reference(memory[:, :4]), heads=HEADS)
    torch.testing.assert_close(masked, absent, rtol=1e-5, atol=1e-5)


def test_given_attention_kernel_is_used(adapter, states):
    calls = list[int]()

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None
    ) -> Tensor:
        calls.append(heads)
        assert mask is None
        return torch_attention(query, key, value, heads)

    key, value = adapter.project_reference(reference())
    out = adapter(*states, key, value, heads=HEADS, attention=kernel)
    assert calls == [HEADS]
    assert torch.equal(out, adapter(*states, key, value, heads=HEADS))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)],
)
def test_fused_adapter_equals_the_trained_one(adapter, states, dtype, tolerance):
    expected = adapter(*states, *adapter.project_reference(reference()), heads=HEADS)
    fused = FusedAdapter(fused_weights(adapter), nn, dtype)
    x, own, memory = (t.to(dtype) for t in (*states, reference()))
    out = fused(x, own, *fused.project_reference(memory), heads=HEADS)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


def test_half_precision_adapters_are_fused_in_float32(adapter):
    half = copy.deepcopy(adapter).half()
    fused = FusedAdapter(fused_weights(half), nn, torch.float32)
    _, w_ref = half.merge.weight.float().chunk(2, dim=1)
    assert torch.equal(fused.state_dict()["merge_ref.weight"], w_ref @ half.to_out.weight.float())


def test_fusing_leaves_the_trained_adapter_alone(adapter):
    before = copy.deepcopy(adapter.state_dict())
    fused = FusedAdapter(fused_weights(adapter), nn, torch.float32)
    for parameter in fused.parameters():
        parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())
    assert not any(parameter.requires_grad for parameter in fused.parameters())


@pytest.mark.parametrize("width", [8, 24, 32])
def test_parameter_counts_follow_the_closed_forms(width: int):
    adapter = ReferenceAdapter(width)
    fused = FusedAdapter(fused_weights(adapter), nn, torch.float32)
    assert sum(p.numel() for p in adapter.parameters()) == 6 * width**2 + 4 * width
    assert sum(p.numel() for p in fused.parameters()) == 5 * width**2 + 3 * width


def test_released_adapters_of_stable_diffusion_have_25207040_parameters_in_45_tensors():
    widths = {
        "middle_block.1": 1280,
        "output_blocks.4.1": 1280,
        "output_blocks.6.1": 640,
        "output_blocks.8.1": 640,
        "output_blocks.10.1": 320,
    }
    with torch.device("meta"):
        adapters = AdapterSet(AdapterInfo(Layout(1024, widths)))
    assert adapters.num_parameters == 25_207_040
    assert len(adapters.state_dict()) == 45
    assert adapters.nbytes == 4 * 25_207_040


def test_set_gives_adapters_by_canonical_name_in_order():
    adapters = AdapterSet(INFO)
    assert adapters.layers == tuple(adapters) == ("middle_block.1", "output_blocks.4.1")
    assert len(adapters) == 2
    assert adapters["output_blocks.4.1"].get_parameter("to_q.weight").shape == (16, 16)
    assert adapters.family == "custom-48"


def test_unknown_layer_is_no_adapter():
    with pytest.raises(AttributeError, match="output_blocks-9-1"):
        AdapterSet(INFO)["output_blocks.9.1"]


def test_fused_set_keeps_layers_and_information():
    fused = AdapterSet(INFO).fuse(dtype=torch.float16)
    assert fused.info is INFO
    assert fused.layers == INFO.layout.layers
    assert {p.dtype for p in fused.parameters()} == {torch.float16}
    assert fused.nbytes == 2 * sum(5 * d**2 + 3 * d for d in (24, 16))


def test_fused_layers_are_made_of_the_given_operations():
    class Operations:
        class Linear(nn.Linear):
            pass

        class LayerNorm(nn.LayerNorm):
            pass

    kinds = {type(m) for m in AdapterSet(INFO).fuse(Operations).modules() if not list(m.children())}
    assert kinds == {Operations.Linear, Operations.LayerNorm}
