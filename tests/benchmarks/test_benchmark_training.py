"""The training benchmark: both sides compute the same thing, and the command prints its tables."""

import json
import time

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.flops import count_flops
from benchmarks.models import SIZES
from benchmarks.textbook import CACHED_LAYERS, TextbookLoop
from benchmarks.timing import Spread, Stopwatch, alternate, ratios
from benchmarks.training import measure_memory
from benchmarks.training_runs import IMAGES, PLAIN, PRECOMPUTED, TARGETS, Runs, Settings
from dreamcache_core.method.adapter import AdapterSet

pytestmark = pytest.mark.diffusers

CPU = torch.device("cpu")
NAMES = {"norm": "norm2_mem", "merge": "linear_cat"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    settings = Settings("tiny", batch=3, steps=1, dtype="float32", resolution=128)
    return Runs(settings, tmp_path_factory.mktemp("benchmark"))


def textbook_name(name: str) -> str:
    module, parameter = name.split(".")
    return f"{NAMES.get(module, module)}.{parameter}"


def copy_random_weights(plain: TextbookLoop, adapters: AdapterSet) -> None:
    """Give both sides the same adapters, none of whose weights is 0, so that the reference counts."""
    for adapter, layer in zip(plain.adapters, CACHED_LAYERS.values(), strict=True):
        torch.nn.init.normal_(adapters[layer].merge.weight, std=0.1)
        weights = adapters[layer].state_dict()
        adapter.load_state_dict({textbook_name(name): w for name, w in weights.items()})


def test_textbook_and_product_agree_in_loss_and_gradients(runs):
    torch.manual_seed(0)
    module, plain = runs.trainer.module, runs.plain
    copy_random_weights(plain, module.adapters)
    batch = runs.batches[IMAGES][0]
    batch = {**batch, "is_dropped": torch.tensor([False, True, False])}
    expected = plain.loss(batch)
    expected.backward()
    with module.until_backward():
        loss = runs.loop.loss(batch)
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for adapter, layer in zip(plain.adapters, CACHED_LAYERS.values(), strict=True):
        theirs = dict(adapter.named_parameters())
        for name, parameter in module.adapters[layer].named_parameters():
            gradient = theirs[textbook_name(name)].grad
            assert gradient.abs().max() > 0
            tolerance = 1e-4 * float(gradient.abs().max())
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=tolerance)
    plain.optimizer.zero_grad()
    runs.loop.optimizer.zero_grad()


def test_all_loops_take_the_same_samples(runs):
    kinds = runs.batches
    assert list(kinds) == [PLAIN, IMAGES, TARGETS, PRECOMPUTED]
    for first, second in zip(kinds[PLAIN], kinds[PRECOMPUTED], strict=True):
        assert torch.equal(first["noise"], second["noise"])
        assert torch.equal(first["timestep"], second["timestep"])
        latent = runs.plain.encode_images(first["target"])
        torch.testing.assert_close(second["target_latent"].float(), latent, rtol=1e-2, atol=1e-2)
    assert {"reference", "target_latent"} <= kinds[TARGETS][0].keys()
    assert "target" not in kinds[TARGETS][0].keys() | kinds[PRECOMPUTED][0].keys()


def test_only_adapters_learn_in_either_loop(runs):
    copy_random_weights(runs.plain, runs.trainer.module.adapters)
    unet = {name: weight.clone() for name, weight in runs.trainer.base.unet.named_parameters()}
    steps = runs.steps()
    for name, adapters in ((PLAIN, runs.plain.adapters), (IMAGES, runs.trainer.module)):
        before = [weight.detach().clone() for weight in adapters.parameters()]
        steps[name]()
        assert all(
            not torch.equal(old, new)
            for old, new in zip(before, adapters.parameters(), strict=True)
        )
    assert all(torch.equal(unet[n], w) for n, w in runs.trainer.base.unet.named_parameters())


def test_the_encoder_half_keeps_nothing_for_backward_unless_it_is_in_the_graph(runs):
    without, with_graph = measure_memory(runs).values()
    assert 0 < without.saved_bytes < 0.9 * with_graph.saved_bytes
    assert without.peak_bytes is None


def test_the_command_prints_tables_and_writes_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # the command sets it; this takes it back
    file = tmp_path / "figures.json"
    command = ["training", "--size", "tiny", "--batch", "1", "--steps", "1", "--json", str(file)]
    assert main(command) in (0, 1)
    out = capsys.readouterr().out
    figures = json.loads(file.read_text())
    for name in (PLAIN, IMAGES, TARGETS, PRECOMPUTED):
        assert f"\n{name} " in out
        assert figures["loops"][name]["images_per_s"]["median"] > 0
    loops = figures["loops"]
    assert loops[PLAIN]["ratio"] == {"median": 1, "low": 1, "high": 1}
    counts = [loops[name]["flops"] for name in (PLAIN, IMAGES, TARGETS, PRECOMPUTED)]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4
    assert loops[PRECOMPUTED]["phases_s"]["VAE"] == loops[PRECOMPUTED]["phases_s"]["text"] == 0
    assert all(seconds > 0 for seconds in loops[PLAIN]["phases_s"].values())
    assert "expected 1.3 or more" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["training", "--size", "huge"], "invalid choice: 'huge'"),
        (["training", "--steps", "0"], "above 0, given 0"),
    ],
)
def test_wrong_arguments_are_refused(capsys, wrong, message):
    with pytest.raises(SystemExit, match="2"):
        main(wrong)
    assert message in capsys.readouterr().err


def test_bad_resolutions_are_named(capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert main(["training", "--size", "tiny", "--resolution", "100"]) == 2
    assert "multiple of 8" in capsys.readouterr().err


def test_actions_are_timed_in_turn_after_one_call_each():
    calls: list[str] = []
    seconds = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, CPU)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_actions_are_timed_by_the_clock_that_is_given():
    ticks = iter([0.0, 3.0, 10.0, 14.0])
    assert alternate({"a": list}, 2, CPU, lambda _: next(ticks)) == {"a": [3.0, 4.0]}


def test_ratios_are_taken_round_by_round():
    assert ratios([4.0, 9.0, 1.0], [2.0, 3.0, 1.0]) == Spread(2.0, 1.0, 3.0)
    assert f"{Spread(2.0, 1.0, 3.0):.1f}" == "2.0 (1.0 - 3.0)"


def test_a_phase_inside_another_counts_for_the_inner_one_alone():
    stopwatch = Stopwatch(CPU)
    with stopwatch.phase("outer"), stopwatch.phase("inner"):
        time.sleep(0.05)
    assert stopwatch.seconds["inner"] >= 0.05
    assert stopwatch.seconds["outer"] < 0.04


def test_operations_of_attention_are_counted_on_the_cpu():
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attend(query, key, key)) == 2 * (2 * 2 * 3 * 5 * 7 * 8)
    assert count_flops(lambda: torch.ones(4, 5) @ torch.ones(5, 6)) == 2 * 4 * 5 * 6


def test_full_size_is_that_of_stable_diffusion_2():
    from benchmarks.models import _text_encoder, _unet, _vae

    with torch.device("meta"):
        parts = [make(SIZES["sd21"]) for make in (_unet, _vae, _text_encoder)]
    counts = [sum(weight.numel() for weight in part.parameters()) for part in parts]
    assert counts == [865_910_724, 83_653_863, 340_387_840]
