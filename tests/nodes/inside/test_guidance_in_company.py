"""METHOD.md section 5 next to nodes and guiders that tell rows apart, count, split predictions or ask for them in their own way."""

import importlib.util
import logging
from types import SimpleNamespace

import comfy.controlnet
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_perpneg as perpneg
import pytest
import torch
from test_company import COMPANIONS, run_core, run_extra
from tiny import (
    CallCounter,
    apply,
    assert_close,
    encode,
    make_adapters,
    make_controlnet,
    make_image,
    make_model,
    make_text,
    sample,
)

import nodes as comfy_nodes

CFG, IMAGE = 7.5, 0.4
NO_EFFECT = "image_guidance has no effect"


@pytest.fixture(scope="module")
def parts():
    with torch.inference_mode():
        model = make_model()
        return model, make_adapters(model), encode(model)


def warned(caplog):
    """What the pack has logged; ComfyUI itself logs under root."""
    return "".join(record.getMessage() for record in caplog.records if record.name != "root")


def first_step(model, **inputs):
    """What a post-CFG function is given at the first step of a run."""
    seen = []
    model = model.clone()
    model.set_model_sampler_post_cfg_function(
        lambda args: seen.append(args) or args["denoised"], disable_cfg1_optimization=True
    )
    sample(model, steps=1, **inputs)
    return seen[0]


def three_terms(model, adapters, reference, companion, **inputs):
    """METHOD.md section 5 by hand: predictions with the reference are ComfyUI's own pair, the third is the plain model's."""
    pair = first_step(companion(apply(model, adapters, reference, image_guidance=1.0)), **inputs)
    e_ct, e_c = pair["cond_denoised"], pair["uncond_denoised"]
    e_u = first_step(companion(model), **inputs)["uncond_denoised"]
    return e_u + inputs.get("cfg", CFG) * (e_ct - e_c) + IMAGE * (e_c - e_u)


# --- nodes that tell the rows of a batch apart ---------------------------------------------------------------------


def index_rows(model):
    """A function wrapper that scales what it gets by (cond, uncond)[i]."""
    model = model.clone()

    def wrapper(apply_model, args):
        out = apply_model(args["input"], args["timestep"], **args["c"])
        rows = zip(out.chunk(len(args["cond_or_uncond"])), args["cond_or_uncond"], strict=True)
        return torch.cat([row * (1.0, 0.8)[i] for row, i in rows])

    model.set_model_unet_function_wrapper(wrapper)
    return model


def weaken_uncond(model):
    """A patch with another strength for the rows of list 1."""
    model = model.clone()

    def patch(n, extra):
        rows = zip(n.chunk(len(extra["cond_or_uncond"])), extra["cond_or_uncond"], strict=True)
        return torch.cat([row * (0.5 if i == 1 else 1.0) for row, i in rows])

    model.set_model_attn2_output_patch(patch)
    return model


def pair_rows(model):
    """What core's NAGuidance does: the first row of list 1 moves that of list 0."""
    model = model.clone()

    def patch(n, extra):
        lists = extra["cond_or_uncond"]
        if not {0, 1} <= set(lists):
            return n
        rows = list(n.chunk(len(lists)))
        positive, negative = lists.index(0), lists.index(1)
        rows[positive] = 1.5 * rows[positive] - 0.5 * rows[negative]
        return torch.cat(rows)

    model.set_model_attn1_output_patch(patch)
    return model


def core_nag(model):
    return run_extra("nag", "NAGuidance", model, nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5)


READERS = {
    "function wrapper": index_rows,
    "another strength": weaken_uncond,
    "pairs": pair_rows,
    "image prompt": COMPANIONS["image prompt"],
}
if importlib.util.find_spec("comfy_extras.nodes_nag"):
    READERS["NAGuidance"] = core_nag
ROWS_THAT_FIT = [1, 3]


def fit(monkeypatch, model, rows):
    """Let ComfyUI find memory for so many rows of one image at a time."""
    monkeypatch.setattr(
        model.model, "memory_required", lambda shape, **_: 1e30 if shape[0] > rows else 0.0
    )


@pytest.mark.parametrize(("cfg", "rows"), [*((CFG, rows) for rows in ROWS_THAT_FIT), (1.0, 3)])
@pytest.mark.parametrize("name", READERS)
def test_nodes_that_read_cond_or_uncond_take_the_row_without_reference_for_a_negative(
    parts, monkeypatch, name, cfg, rows
):
    model, adapters, reference = parts
    fit(monkeypatch, model, rows)
    companion = READERS[name]
    ours = first_step(companion(apply(model, adapters, reference)), cfg=cfg)["denoised"]
    assert_close(ours, three_terms(*parts, companion, cfg=cfg), 1e-4)


def test_a_node_that_keeps_the_negatives_attention_keeps_that_of_the_one_with_the_reference(parts):
    """As core's SelfAttentionGuidance does in the middle block."""
    attention = []

    def companion(model):
        model = model.clone()

        def record(q, k, v, extra):
            lists = extra["cond_or_uncond"]
            if 1 in lists:
                attention.append(q.chunk(len(lists))[lists.index(1)])
            return comfy.ldm.modules.attention.optimized_attention(q, k, v, extra["n_heads"])

        model.set_model_attn1_replace(record, "output", 5, 0)
        return model

    model, adapters, reference = parts
    sample(companion(apply(model, adapters, reference)), steps=1)
    ours = attention[-1]
    sample(companion(apply(model, adapters, reference, image_guidance=1.0)), steps=1)
    assert_close(ours, attention[-1], 1e-4)


class NegativeStrength(comfy.controlnet.ControlNet):
    """A ControlNet of a pack: half as strong for the negative, by ``cond_or_uncond``."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        control = super().get_control(x_noisy, t, cond, batched_number, transformer_options)
        lists = transformer_options["cond_or_uncond"]
        for outputs in control.values():
            for i, output in enumerate(outputs):
                if output is not None:
                    rows = zip(output.chunk(len(lists)), lists, strict=True)
                    outputs[i] = torch.cat([r * (0.5 if n == 1 else 1.0) for r, n in rows])
        return control

    def copy(self):
        copied = super().copy()
        copied.__class__ = NegativeStrength
        return copied


@pytest.fixture(scope="module")
def controlnet():
    return make_controlnet()


def controlled(model, network, kind, nodes=1):
    texts = make_text(model, 1), make_text(model, 2)
    for _ in range(nodes):
        net = kind(network, load_device=comfy.model_management.get_torch_device())
        texts = run_core("ControlNetApplyAdvanced", *texts, net, make_image(6), 0.5, 0.0, 1.0)
        kind = comfy.controlnet.ControlNet
    return {"positive": texts[0], "negative": texts[1]}


@pytest.mark.parametrize(("rows", "nodes"), [(1, 1), (3, 1), (3, 2)])
def test_a_controlnet_with_a_strength_of_its_own_for_the_negative_has_it_in_both(
    parts, controlnet, monkeypatch, rows, nodes
):
    model, adapters, reference = parts
    fit(monkeypatch, model, rows)
    texts = controlled(model, controlnet, NegativeStrength, nodes)
    ours = first_step(apply(model, adapters, reference), **texts)["denoised"]
    assert_close(ours, three_terms(*parts, lambda m: m, **texts), 1e-4)


def rows_per_call(model, **inputs):
    with CallCounter(model) as counter:
        sample(model, steps=1, **inputs)
    return counter.rows


def test_a_call_of_its_own_is_made_only_next_to_nodes_that_can_tell_rows_apart(parts, controlnet):
    model = parts[0]
    applied = apply(*parts)
    assert rows_per_call(applied) == [3]
    assert rows_per_call(COMPANIONS["LoRA"](applied)) == [3]
    assert rows_per_call(COMPANIONS["EasyCache"](applied)) == [3]
    texts = controlled(model, controlnet, comfy.controlnet.ControlNet)
    assert rows_per_call(applied, **texts) == [3]
    assert rows_per_call(index_rows(applied)) == [1, 2]
    assert rows_per_call(pair_rows(applied)) == [1, 2]
    assert rows_per_call(pair_rows(apply(*parts, image_guidance=1.0))) == [2]
    texts = controlled(model, controlnet, NegativeStrength)
    assert rows_per_call(applied, **texts) == [1, 2]


# --- state of other nodes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "cfg", "outer_sample"),
    [
        ({"scale": 0.0}, CFG, "ours"),
        ({"image_guidance": 1.0}, CFG, "ours"),
        ({"image_guidance": 0.4}, CFG, "ours"),
        ({"image_guidance": 0.4}, 1.0, "ours"),
        ({"image_guidance": 0.4}, 1.0, "left out"),
    ],
)
def test_what_a_post_cfg_function_keeps_in_model_options_lives_for_the_run(
    parts, settings, cfg, outer_sample
):
    counts, options = [], []
    model = apply(*parts, **settings)

    def count(args):
        kept = args["model_options"]
        kept["steps"] = kept.get("steps", 0) + 1
        kept["transformer_options"]["steps"] = kept["transformer_options"].get("steps", 0) + 1
        counts.append((kept["steps"], kept["transformer_options"]["steps"]))
        options.append(kept)
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(count)
    if outer_sample == "left out":
        outer = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
        model.remove_wrappers_with_key(outer, "dreamcache")
    sample(model, steps=3, cfg=cfg)
    assert counts == [(n, n) for n in (1, 2, 3)]
    assert all("disable_cfg1_optimization" not in kept for kept in options)


def test_an_option_that_another_node_has_set_is_there_after_the_step(parts):
    seen = []

    def look(executor, x, timestep, model_options, *args, **kwargs):
        result = executor(x, timestep, model_options, *args, **kwargs)
        seen.append(model_options["disable_cfg1_optimization"])
        return result

    model = parts[0].clone()
    model.model_options["disable_cfg1_optimization"] = True
    predict_noise = comfy.patcher_extension.WrappersMP.PREDICT_NOISE
    model.add_wrapper_with_key(predict_noise, "another", look)
    sample(apply(model, *parts[1:]), steps=2)
    assert seen == [True, True]


# --- guiders and nodes that ask in their own way -------------------------------------------------------------------


def guide(guider, steps=3, size=(16, 16)):
    """What SamplerCustomAdvanced does."""
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    noise = torch.randn((1, 4, *size), generator=torch.manual_seed(5))
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=5)


def with_texts(guider, cfg=CFG):
    model = guider.model_patcher
    guider.set_conds(make_text(model, 1), make_text(model, 2))
    guider.set_cfg(cfg)
    return guider


class NoNegativeAtOne(comfy.samplers.CFGGuider):
    """A guider whose cfg falls to 1 in the second half of the run, where it leaves the negative out by itself."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        positive, negative = self.conds["positive"], self.conds["negative"]
        is_late = timestep[0] < 1.0
        rest = (x, timestep, model_options)
        conds = [positive, None if is_late else negative]
        cond, uncond = comfy.samplers.calc_cond_batch(self.inner_model, conds, *rest)
        return cond if is_late else uncond + self.cfg * (cond - uncond)


class OneAtOne(NoNegativeAtOne):
    """The same, with the negative."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        cfg = 1.0 if timestep[0] < 1.0 else self.cfg
        model_options = {**model_options, "disable_cfg1_optimization": True}
        return comfy.samplers.sampling_function(
            self.inner_model,
            x,
            timestep,
            self.conds["negative"],
            self.conds["positive"],
            cfg,
            model_options=model_options,
            seed=seed,
        )


@pytest.mark.parametrize("image_guidance", [0.4, 3.0])
def test_a_guider_that_leaves_the_negative_out_at_cfg_one_keeps_image_guidance(
    parts, caplog, image_guidance
):
    applied = apply(*parts, image_guidance=image_guidance)
    with caplog.at_level(logging.WARNING):
        ours = guide(with_texts(NoNegativeAtOne(applied)), steps=6)
    assert not warned(caplog)
    assert_close(ours, guide(with_texts(OneAtOne(applied)), steps=6), 1e-4)
    plain = apply(*parts, image_guidance=1.0)
    assert (ours - guide(with_texts(OneAtOne(plain)), steps=6)).abs().max() > 1e-3


def split_predictions(model, order):
    """A node that asks for the two predictions one by one, as SkipLayerGuidanceDiTSimple does."""
    model = model.clone()

    def one_by_one(args):
        rest = (args["input"], args["sigma"], args["model_options"])
        out = [None, None]
        for i in order:
            conds = [cond if i == j else None for j, cond in enumerate(args["conds"])]
            out[i] = comfy.samplers.calc_cond_batch(args["model"], conds, *rest)[i]
        return out

    model.set_model_sampler_calc_cond_batch_function(one_by_one)
    return model


@pytest.mark.parametrize(
    ("order", "cfg", "settings"),
    [
        ((0, 1), CFG, {}),
        ((1, 0), CFG, {}),
        ((0, 1), 1.0, {}),
        ((0, 1), CFG, {"guidance": "joint"}),
    ],
)
def test_a_node_that_splits_the_predictions_keeps_guidance(parts, caplog, order, cfg, settings):
    applied = apply(*parts, **settings)
    with caplog.at_level(logging.WARNING):
        ours = sample(split_predictions(applied, order), cfg=cfg, steps=2)
    assert_close(ours, sample(applied, cfg=cfg, steps=2), 1e-4)
    assert not warned(caplog)


def test_a_further_prediction_is_shifted_next_to_none_too(parts, caplog):
    """Pre-CFG nodes ask for ``[cond, None]`` and take the difference."""
    applied = apply(*parts)
    model = applied.clone()

    def add_difference(args):
        conds, rest = [args["cond"], None], (args["input"], args["sigma"], args["model_options"])
        again = comfy.samplers.calc_cond_batch(args["model"], conds, *rest)[0]
        return args["denoised"] + 3.0 * (args["cond_denoised"] - again)

    model.set_model_sampler_post_cfg_function(add_difference)
    with caplog.at_level(logging.WARNING):
        assert_close(sample(model, steps=2), sample(applied, steps=2), 1e-4)
    assert not warned(caplog)


def basic(model):
    guider = custom.Guider_Basic(model)
    guider.set_conds(make_text(model, 1))
    return guider


def test_basic_guider_is_said_to_take_no_image_guidance(parts, caplog):
    with caplog.at_level(logging.WARNING):
        guide(basic(apply(*parts)))
    assert warned(caplog).count(NO_EFFECT) == 1
    assert "negative" in warned(caplog)
    caplog.clear()
    guide(basic(apply(*parts, image_guidance=1.0)))
    guide(basic(apply(*parts, guidance="joint")))
    guide(basic(apply(*parts, scale=0.0)))
    assert not warned(caplog)


def test_a_pack_that_replaces_calc_cond_batch_is_said_to_disable_image_guidance(
    parts, caplog, monkeypatch
):
    monkeypatch.setattr(comfy.samplers, "calc_cond_batch", comfy.samplers._calc_cond_batch)
    with caplog.at_level(logging.WARNING):
        sample(apply(*parts), steps=3)
    assert warned(caplog).count(NO_EFFECT) == 1


@pytest.fixture
def numbered(monkeypatch):
    """Let Apply DreamCache execute as the node of this id."""

    def as_node(node_id):
        node = comfy_nodes.NODE_CLASS_MAPPINGS["DreamCacheApply"]
        monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id=node_id))

    return as_node


def test_image_guidance_without_effect_is_said_on_the_node_that_asks_for_it(parts, page, numbered):
    model, adapters, reference = parts
    numbered("5")
    applied = apply(model, adapters, reference, image_guidance=3.0)
    numbered("8")
    applied = apply(applied, adapters, reference)
    page.texts.clear()
    guide(basic(applied))
    assert [node for node, _ in page.texts] == ["5"]
    assert NO_EFFECT in page.texts[0][1]
    page.texts.clear()
    guide(with_texts(comfy.samplers.CFGGuider(applied)))
    assert not page.texts


def test_a_stretched_region_mask_is_said_on_its_apply_node(parts, page, numbered):
    model, adapters, reference = parts
    numbered("5")
    applied = apply(model, adapters, reference, mask=torch.ones(1, 64, 256).tril())
    numbered("8")
    applied = apply(applied, adapters, reference)
    page.texts.clear()
    sample(applied, steps=1)
    assert [node for node, _ in page.texts] == ["5"]
    assert "was stretched" in page.texts[0][1]


# --- two models ----------------------------------------------------------------------------------------------------


def dual_model(model, negative):
    return with_texts(custom.Guider_DualModel(model, negative))


@pytest.mark.parametrize("has_reference", [False, True])
def test_the_negative_of_another_network_is_that_networks_own(parts, caplog, has_reference):
    other = make_model(seed=3)
    negative = apply(other, make_adapters(other, seed=3)) if has_reference else other
    with caplog.at_level(logging.WARNING):
        ours = guide(dual_model(apply(*parts), negative), steps=1)
    assert NO_EFFECT in warned(caplog)
    cond = guide(basic(apply(*parts)), steps=1)
    uncond = guide_text(other, 2)
    assert_close(ours, uncond + CFG * (cond - uncond), 1e-4)


def guide_text(model, text):
    guider = custom.Guider_Basic(model)
    guider.set_conds(make_text(model, text))
    return guide(guider, steps=1)


def test_two_models_of_one_network_are_said_to_take_no_image_guidance(parts, caplog):
    with caplog.at_level(logging.WARNING):
        ours = guide(dual_model(apply(*parts), parts[0]), steps=2)
    assert NO_EFFECT in warned(caplog)
    caplog.clear()
    single = with_texts(comfy.samplers.CFGGuider(apply(*parts, image_guidance=1.0)))
    assert_close(ours, guide(single, steps=2), 1e-4)
    guide(dual_model(apply(*parts, image_guidance=1.0), parts[0]), steps=2)
    assert not warned(caplog)


NO_JOINT = "guidance joint has no effect"


def perp_neg(model):
    guider = perpneg.Guider_PerpNeg(model)
    guider.set_conds(make_text(model, 1), make_text(model, 2), make_text(model, 3))
    guider.set_cfg(CFG, 1.0)
    return guider


def test_joint_guidance_is_said_to_be_missing_where_no_negative_is_known(parts, caplog):
    model = apply(*parts, guidance="joint")
    with caplog.at_level(logging.WARNING):
        for guider in (basic(model), with_texts(comfy.samplers.CFGGuider(model))):
            guide(guider, steps=1)
        assert not warned(caplog)
        guide(perp_neg(model), steps=1)
    assert NO_JOINT in warned(caplog)


def test_joint_guidance_is_said_to_be_missing_with_two_models_of_one_network(parts, caplog):
    model = apply(*parts, guidance="joint")
    with caplog.at_level(logging.WARNING):
        guide(dual_model(model, make_model(seed=3)), steps=1)
        assert not warned(caplog)
        guide(dual_model(model, parts[0]), steps=1)
    assert NO_JOINT in warned(caplog)


if not hasattr(custom, "Guider_DualModel"):  # as in ComfyUI 0.3.64
    del test_the_negative_of_another_network_is_that_networks_own
    del test_joint_guidance_is_said_to_be_missing_with_two_models_of_one_network
    del test_two_models_of_one_network_are_said_to_take_no_image_guidance


# --- fewer predictions than asked for ------------------------------------------------------------------------------


def test_a_node_that_answers_two_predictions_only_keeps_image_guidance_and_is_said(parts, caplog):
    model = parts[0].clone()
    batch = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
    model.add_wrapper_with_key(batch, "another", lambda executor, *args: executor(*args)[:2])
    with caplog.at_level(logging.WARNING):
        before = sample(apply(model, *parts[1:]), steps=3)
    assert not warned(caplog)
    after = apply(*parts)
    after.add_wrapper_with_key(batch, "another", lambda executor, *args: executor(*args)[:2])
    with caplog.at_level(logging.WARNING):
        after = sample(after, steps=3)
    assert warned(caplog).count("fewer predictions") == 1
    expected = sample(apply(*parts), steps=3)
    assert_close(before, expected, 1e-4)
    assert_close(after, expected, 1e-4)
