"""Encode Reference, and what else looks at a MODEL once, on a MODEL that other nodes have changed."""

import importlib.util
import threading

import comfy.model_management
import comfy.samplers
import pytest
import torch
from tiny import CPU, apply, assert_close, encode, make_model, make_text, run


@pytest.fixture
def model():
    return make_model("sd15")


def assert_same(one, other, relative=0.0):
    for layer in other.layers:
        assert_close(one.features[layer], other.features[layer], relative)


# --- other threads and devices -----------------------------------------------------------------------------------


def in_worker_thread(function, *args):
    """Call as ComfyUI's workers do: in a thread that hands back results and ``Exception``s, and nothing else."""
    answers = []

    def work():
        with torch.inference_mode():
            try:
                answers.append((function(*args), None))
            except Exception as error:
                answers.append((None, error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    result, error = answers[0]
    if error:
        raise error
    return result


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_frame_of_comfyuis_sees_that_the_pass_ends_early(model, monkeypatch):
    plain, predict = encode(model), comfy.samplers.calc_cond_batch
    monkeypatch.setattr(
        comfy.samplers, "calc_cond_batch", lambda *args: in_worker_thread(predict, *args)
    )
    assert_same(encode(model), plain)


if importlib.util.find_spec("comfy.multigpu"):
    import comfy.multigpu

    @pytest.fixture
    def split(model, monkeypatch):
        """What MultiGPU CFG Split makes of a MODEL where there are two devices."""
        devices = [CPU, torch.device("cpu", 0)]
        management = comfy.model_management
        monkeypatch.setattr(management, "get_all_torch_devices", lambda **_: devices)
        monkeypatch.setattr(management, "set_torch_device", lambda _: None)
        model.cached_patcher_init = (make_model, ("sd15",))
        return comfy.multigpu.create_multigpu_deepclones(model, 2)

    def test_encoding_uses_one_device_of_a_model_that_is_split_over_several(model, split):
        assert len(split.get_additional_models_with_key("multigpu")) == 1
        assert_same(encode(split), encode(model))

    def test_attention_map_of_a_model_that_is_split_over_several_devices(model, split):
        def look(model):
            return run(
                "DreamCacheAttentionMap",
                model=apply(model),
                positive=make_text(model, 1),
                latent={"samples": torch.zeros(1, 4, 16, 16)},
                reference_image=torch.ones(1, 128, 128, 3),
            )[0]

        assert torch.equal(look(split), look(model))
