"""DreamCache next to other nodes: ComfyUI's own node classes, in both orders, and against the rule worked out by hand."""

import importlib

import comfy.controlnet
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
from tiny import (
    APPLIED,
    CallCounter,
    apply,
    assert_close,
    encode,
    lora_weights,
    make_adapters,
    make_controlnet,
    make_image,
    make_model,
    make_text,
    run,
    sample,
)

import nodes as comfy_nodes

IMAGE_SCALE = 0.4


def run_extra(module, name, model, **inputs):
    """Execute a node of comfy_extras, whichever of ComfyUI's node styles this version wrote it in."""
    node = getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), name)
    if hasattr(node, "define_schema"):
        output = node.execute(model, **inputs)
    else:
        output = getattr(node(), node.FUNCTION)(model, **inputs)
    return output[0] if isinstance(output, tuple) else output.result[0]


def run_core(name, *args, **inputs):
    node = comfy_nodes.NODE_CLASS_MAPPINGS[name]
    return getattr(node(), node.FUNCTION)(*args, **inputs)


def add_lora(model):
    return comfy.sd.load_lora_for_models(model, None, lora_weights(), 1.0, 0.0)[0]


def add_image_prompt(model):
    """What IPAdapter-like packs do: an attn2 patch that picks keys by ``cond_or_uncond``."""
    generator = torch.Generator().manual_seed(8)
    width = model.model.model_config.unet_config["context_dim"]
    cond, uncond = torch.randn((2, 1, 3, width), generator=generator)

    def patch(n, context, value, extra):
        index = extra["cond_or_uncond"]
        images = n.shape[0] // len(index)
        more = torch.cat([(cond, uncond)[i].repeat(images, 1, 1) for i in index])
        context = torch.cat([context, more], dim=1)
        return n, context, context

    clone = model.clone()
    clone.set_model_attn2_patch(patch)
    return clone


FREEU = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
COMPANIONS = {
    "LoRA": add_lora,
    "FreeU": lambda m: run_extra("freelunch", "FreeU", m, **FREEU),
    "FreeU_V2": lambda m: run_extra("freelunch", "FreeU_V2", m, **FREEU),
    "HyperTile": lambda m: run_extra(
        "hypertile", "HyperTile", m, tile_size=32, swap_size=1, max_depth=2, scale_depth=False
    ),
    "ToMe": lambda m: run_extra("tomesd", "TomePatchModel", m, ratio=0.5),
    "PAG": lambda m: run_extra("pag", "PerturbedAttentionGuidance", m, scale=3.0),
    "SAG": lambda m: run_extra("sag", "SelfAttentionGuidance", m, scale=0.8, blur_sigma=2.0),
    "RescaleCFG": lambda m: run_extra("model_advanced", "RescaleCFG", m, multiplier=0.7),
    "EasyCache": lambda m: run_extra(
        "easycache",
        "EasyCacheNode",
        m,
        reuse_threshold=1.0,
        start_percent=0.1,
        end_percent=1.0,
        verbose=False,
    ),
    "LazyCache": lambda m: run_extra(
        "easycache",
        "LazyCacheNode",
        m,
        reuse_threshold=1.0,
        start_percent=0.1,
        end_percent=1.0,
        verbose=False,
    ),
    "image prompt": add_image_prompt,
}
# ToMe draws its own random numbers at each call; SAG looks at a single row; caches of steps act on whole batches
STEP_CACHES = {"EasyCache", "LazyCache"}
BY_HAND = sorted(set(COMPANIONS) - {"ToMe", "SAG"} - STEP_CACHES)


class ThreeTerms(comfy.samplers.CFGGuider):
    """METHOD.md section 5 by hand: three predictions, one after the other; that without reference not even sees our wrappers."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        def predict(conds, options):
            return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)

        options = model_options
        negative, positive = self.conds["negative"], self.conds["positive"]
        # of lists of three image guidance keeps out
        e_u, e_c = (
            predict([None, negative, None], given)[1]
            for given in (without_dreamcache(options), options)
        )
        e_ct = predict([positive], options)[0]
        base = e_u + IMAGE_SCALE * (e_c - e_u)
        text = base + e_ct - e_c
        post = options.get("sampler_post_cfg_function", [])
        rest = {k: v for k, v in options.items() if k != "sampler_post_cfg_function"}
        args = (self.inner_model, text, base, self.cfg, x, timestep, rest, positive, negative)
        denoised = base + self.cfg * (e_ct - e_c)
        if "sampler_cfg_function" in options:
            denoised = comfy.samplers.cfg_function(*args)
        # PAG adds a difference of predictions with the reference; euler_cfg_pp needs the folded negative
        for function in post:
            denoised = function(
                {
                    "denoised": denoised,
                    "cond": positive,
                    "uncond": negative,
                    "cond_scale": self.cfg,
                    "model": self.inner_model,
                    "cond_denoised": e_ct,
                    "uncond_denoised": base,
                    "sigma": timestep,
                    "model_options": options,
                    "input": x,
                }
            )
        return denoised


def without_dreamcache(options):
    transformer = options["transformer_options"]
    wrappers = {
        kind: {key: value for key, value in by_key.items() if key != APPLIED.KEY}
        for kind, by_key in transformer["wrappers"].items()
    }
    return {**options, "transformer_options": {**transformer, "wrappers": wrappers}}


@pytest.fixture
def by_hand(monkeypatch):
    """Sample as ``sample`` does, with the three terms by hand."""

    def run_by_hand(model, **inputs):
        with monkeypatch.context() as patch:
            patch.setattr(comfy.samplers, "CFGGuider", ThreeTerms)
            return sample(model, **inputs)

    return run_by_hand


@pytest.fixture(scope="module")
def parts():
    with torch.inference_mode():
        model = make_model()
        return model, make_adapters(model), encode(model)


def denoise(model, noise, **inputs):
    """``sample`` with this noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.sample, "prepare_noise", lambda *_: noise)
        return sample(model, latent=torch.zeros_like(noise), **inputs)


def make_noise(batch, height=16, width=16):
    return torch.randn((batch, 4, height, width), generator=torch.Generator().manual_seed(77))


def differs(ours, theirs):
    return bool(((ours - theirs).abs().max() / theirs.abs().max()) > 1e-3)


# --- nodes on the MODEL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPANIONS)
def test_order_of_the_nodes_in_the_graph_does_not_matter(parts, caplog, name):
    model, adapters, reference = parts
    companion = COMPANIONS[name]
    steps = 6 if name in STEP_CACHES else 2
    before = sample(apply(companion(model), adapters, reference), steps=steps)
    after = sample(companion(apply(model, adapters, reference)), steps=steps)
    assert before.isfinite().all()
    assert torch.equal(before, after)
    assert "image_guidance has no effect" not in caplog.text
    assert differs(before, sample(apply(model, adapters, reference), steps=steps))
    assert differs(before, sample(companion(model), steps=steps))


@pytest.mark.parametrize("name", BY_HAND)
def test_three_terms_by_hand_with_another_node_give_the_same(parts, by_hand, name):
    model, adapters, reference = parts
    both = apply(COMPANIONS[name](model), adapters, reference)
    # rows of one batch against rows alone, cfg 7.5: rounding only
    assert_close(sample(both, steps=2), by_hand(both, steps=2), 1e-4)


@pytest.mark.parametrize("name", COMPANIONS)
def test_another_node_is_bit_identical_to_itself_when_the_scale_is_zero(parts, name):
    model, adapters, reference = parts
    companion = COMPANIONS[name]
    off = sample(apply(companion(model), adapters, reference, scale=0.0), steps=2)
    assert torch.equal(off, sample(companion(model), steps=2))


def test_all_nodes_together_give_the_same_before_and_after(parts):
    model, adapters, reference = parts
    names = ("LoRA", "FreeU_V2", "HyperTile", "PAG", "RescaleCFG", "image prompt")
    before = apply(model, adapters, reference)
    after = model
    for name in names:
        before, after = COMPANIONS[name](before), COMPANIONS[name](after)
    assert torch.equal(sample(before), sample(apply(after, adapters, reference)))


def test_easycache_skips_steps_of_all_three_rows(parts):
    model, adapters, reference = parts
    both = COMPANIONS["EasyCache"](apply(model, adapters, reference))
    original = openaimodel.UNetModel._forward
    rows = []

    def counted(self, x, *args, **kwargs):
        rows.append(len(x))
        return original(self, x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openaimodel.UNetModel, "_forward", counted)
        sample(both, steps=8)
    assert set(rows) == {3}
    assert 2 <= len(rows) < 8


def test_a_lora_is_part_of_the_encoding(parts):
    model, _, reference = parts
    with_lora = encode(add_lora(model))
    layer = reference.layers[1]
    assert differs(with_lora.features[layer], reference.features[layer])


# --- ControlNet and conditionings --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def controlnet():
    device = comfy.model_management.get_torch_device()
    return comfy.controlnet.ControlNet(make_controlnet(), load_device=device)


def control_both(model, texts, controlnet):
    return run_core("ControlNetApplyAdvanced", *texts, controlnet, make_image(6), 0.5, 0.0, 1.0)


def control_one(model, texts, controlnet):
    return control_both(model, texts, controlnet)[0], texts[1]


def control_half_the_run(model, texts, controlnet):
    return run_core("ControlNetApplyAdvanced", *texts, controlnet, make_image(6), 0.5, 0.0, 0.5)


def set_areas(model, texts, controlnet):
    """Two regions on the prompt, one on the negative."""
    positive, negative = texts
    left = run_core("ConditioningSetArea", positive, 64, 128, 0, 0, 1.0)[0]
    more = make_text(model, 3)
    return left + more, negative


def set_masks(model, texts, controlnet):
    positive, negative = texts
    mask = torch.zeros((1, 128, 128))
    mask[:, :64] = 1
    top = run_core("ConditioningSetMask", positive, mask, "default", 1.0)[0]
    return top + run_core("ConditioningSetMask", negative, 1 - mask, "mask bounds", 0.7)[
        0
    ], negative


def set_ranges(model, texts, controlnet):
    positive, negative = texts
    early = run_core("ConditioningSetTimestepRange", positive, 0.0, 0.5)[0]
    late = run_core("ConditioningSetTimestepRange", make_text(model, 3), 0.5, 1.0)[0]
    negative = run_core("ConditioningSetTimestepRange", negative, 0.0, 0.9)[0]
    return early + late, negative + run_core(
        "ConditioningSetTimestepRange", make_text(model, 4), 0.9, 1.0
    )[0]


CONDITIONINGS = {
    "ControlNet on both": control_both,
    "ControlNet on one": control_one,
    "ControlNet for half the run": control_half_the_run,
    "areas": set_areas,
    "masks": set_masks,
    "timestep ranges": set_ranges,
}


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_conditioning_nodes_act_on_all_three_terms(parts, controlnet, by_hand, name):
    model, adapters, reference = parts
    texts = make_text(model, 1), make_text(model, 2)
    positive, negative = CONDITIONINGS[name](model, texts, controlnet)
    inputs = {"positive": positive, "negative": negative, "steps": 4}
    applied = apply(model, adapters, reference)
    ours = sample(applied, **inputs)
    assert_close(ours, by_hand(applied, **inputs), 1e-4)
    assert differs(ours, sample(applied, steps=4))
    assert differs(ours, sample(model, **inputs))


def test_inpainting_keeps_what_is_outside_the_mask(parts, by_hand):
    model, adapters, reference = parts
    applied = apply(model, adapters, reference)
    mask = torch.zeros((1, 128, 128))
    mask[:, 32:96, 32:96] = 1
    image = make_noise(1) * 0.5
    samples = run_core("SetLatentNoiseMask", {"samples": image}, mask)[0]
    inputs = {"latent": image, "noise_mask": samples["noise_mask"], "steps": 4}
    ours = sample(applied, **inputs)
    assert_close(ours, by_hand(applied, **inputs), 1e-4)
    outside = torch.nn.functional.interpolate(mask[None], size=(16, 16))[0] < 0.5
    assert_close(ours[0][:, outside[0]], image[0][:, outside[0]], 1e-5)
    assert differs(ours, sample(model, **inputs))


def test_image_to_image_starts_from_the_image(parts, by_hand):
    model, adapters, reference = parts
    applied = apply(model, adapters, reference)
    inputs = {"latent": make_noise(1) * 0.5, "denoise": 0.5, "steps": 4}
    ours = sample(applied, **inputs)
    assert_close(ours, by_hand(applied, **inputs), 1e-4)
    assert differs(ours, sample(model, **inputs))


# --- samplers ----------------------------------------------------------------------------------------------------

SAMPLERS = ("euler", "euler_cfg_pp", "dpmpp_2m", "uni_pc", "lcm", "ddim")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_follow_the_three_term_rule(parts, by_hand, sampler):
    model, adapters, reference = parts
    applied = apply(model, adapters, reference)
    inputs = {"sampler": sampler, "steps": 4, "cfg": 1.5 if sampler == "euler_cfg_pp" else 7.5}
    with CallCounter(model) as counter:
        ours = sample(applied, **inputs)
    assert set(counter.rows) == {3}
    assert ours.isfinite().all()
    assert_close(ours, by_hand(applied, **inputs), 1e-4)
    assert differs(ours, sample(model, **inputs))


# --- batches, references, sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_an_image_of_a_batch_is_the_image_made_alone(parts, batch):
    model, adapters, reference = parts
    applied = apply(model, adapters, reference)
    noise = make_noise(batch)
    together = denoise(applied, noise)
    for i in range(batch):
        assert_close(together[i], denoise(applied, noise[i : i + 1])[0], 1e-4)


@pytest.mark.parametrize("batch", [2, 3])
def test_region_masks_of_a_batch_belong_to_their_images(parts, batch):
    model, adapters, reference = parts
    masks = torch.zeros((batch, 128, 128))
    for i in range(batch):
        masks[i, 32 * i : 32 * (i + 2)] = 1
    noise = make_noise(batch)
    together = denoise(apply(model, adapters, reference, mask=masks), noise)
    for i in range(batch):
        alone = apply(model, adapters, reference, mask=masks[i : i + 1])
        assert_close(together[i], denoise(alone, noise[i : i + 1])[0], 1e-4)


def test_several_images_of_one_subject_are_one_reference(parts, by_hand):
    model, adapters, reference = parts
    both = run("DreamCacheCombineReferences", reference_1=reference, reference_2=encode(model, 1))[
        0
    ]
    at_once = encode(model, image=torch.cat([make_image(0), make_image(1)]))
    applied = apply(model, adapters, both)
    ours = sample(applied, batch=2)
    assert torch.equal(ours, sample(apply(model, adapters, at_once), batch=2))
    assert_close(ours, by_hand(applied, batch=2), 1e-4)
    assert differs(ours, sample(apply(model, adapters, reference), batch=2))


def test_order_of_two_references_and_of_two_applies_does_not_matter(parts):
    model, adapters, first = parts
    second, other = encode(model, 1), make_adapters(model, seed=1)
    # sums and softmaxes over another order of terms: rounding only
    one = sample(apply(apply(model, adapters, first), other, second), steps=1)
    two = sample(apply(apply(model, other, second), adapters, first), steps=1)
    assert_close(one, two, 1e-5)
    assert differs(one, sample(apply(model, adapters, first), steps=1))
    combined = [
        run("DreamCacheCombineReferences", reference_1=a, reference_2=b)[0]
        for a, b in ((first, second), (second, first))
    ]
    one, two = (sample(apply(model, adapters, reference), steps=1) for reference in combined)
    assert_close(one, two, 1e-5)


SIZES = {"non-square": (12, 24), "odd": (15, 23), "large": (24, 20), "small": (8, 8)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_latents_of_any_size_follow_the_three_term_rule(parts, by_hand, size):
    model, adapters, reference = parts
    mask = torch.zeros((size[0] * 8, size[1] * 8))
    mask[: size[0] * 4] = 1
    applied = apply(model, adapters, reference)
    ours = sample(applied, size=size, batch=2, steps=1)
    assert ours.shape[-2:] == size
    assert_close(ours, by_hand(applied, size=size, batch=2, steps=1), 1e-4)
    assert differs(ours, sample(model, size=size, batch=2, steps=1))
    masked = apply(model, adapters, reference, mask=mask)
    region = sample(masked, size=size, batch=2, steps=1)
    assert_close(region, by_hand(masked, size=size, batch=2, steps=1), 1e-4)
    assert differs(region, ours)


@pytest.mark.parametrize("kind", ["sd21", "sdxl"])
def test_odd_latents_follow_the_three_term_rule_in_other_families(by_hand, kind):
    applied = apply(make_model(kind))
    inputs = {"size": (15, 23), "steps": 1}
    assert_close(sample(applied, **inputs), by_hand(applied, **inputs), 1e-4)


def test_references_may_be_of_any_size_too(parts, by_hand):
    model, adapters, _ = parts
    applied = apply(model, adapters, encode(model, image=make_image(0, 120, 184)))
    assert_close(sample(applied), by_hand(applied), 1e-4)


# --- rows in other batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_rows_split_for_lack_of_memory_give_the_same(parts, monkeypatch, batch):
    model, adapters, reference = parts
    applied = apply(model, adapters, reference, mask=region_of_two()[:batch])
    noise = make_noise(batch)
    together = denoise(applied, noise, steps=1)
    monkeypatch.setattr(model.model, "memory_required", lambda *_, **__: 1e30)
    with CallCounter(model) as counter:
        split = denoise(applied, noise, steps=1)
    assert counter.rows == [batch] * 3
    assert_close(split, together, 1e-5)


def region_of_two():
    masks = torch.zeros((2, 128, 128))
    masks[0, :64], masks[1, :, 64:] = 1, 1
    return masks


def tiled(tiles_per_call):
    """A function wrapper that runs overlapping tiles, several in one call, as tiled diffusion packs do."""

    def wrapper(apply_model, args):
        x, t, c = args["input"], args["timestep"], args["c"]
        starts = (0, 4, 8)
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        for group in chunks(starts, tiles_per_call):
            rows = torch.cat([x[..., s : s + 8] for s in group])
            more = {
                key: comfy.utils.repeat_to_batch_size(value, len(rows))
                if isinstance(value, torch.Tensor)
                else value
                for key, value in c.items()
            }
            out = apply_model(rows, comfy.utils.repeat_to_batch_size(t, len(rows)), **more)
            for s, tile in zip(group, out.chunk(len(group)), strict=True):
                total[..., s : s + 8] += tile
                count[..., s : s + 8] += 1
        return total / count

    return wrapper


def chunks(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


@pytest.mark.parametrize("batch", [1, 2])
def test_tiles_in_one_call_keep_each_row_on_or_off(parts, by_hand, batch):
    model, adapters, reference = parts
    results = []
    for tiles_per_call in (1, 3):
        applied = apply(model, adapters, reference)
        applied.set_model_unet_function_wrapper(tiled(tiles_per_call))
        with CallCounter(model) as counter:
            results.append(sample(applied, batch=batch, steps=2))
        assert set(counter.rows) == {batch * tiles_per_call, 2 * batch * tiles_per_call}
    assert_close(results[1], results[0], 1e-4)
    assert_close(results[1], by_hand(applied, batch=batch, steps=2), 1e-4)
    assert differs(results[1], sample(apply(model, adapters, reference), batch=batch, steps=2))
