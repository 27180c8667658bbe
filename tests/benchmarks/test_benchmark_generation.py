"""The benchmarks of generation: all sides compute the same, bytes are counted right, and the commands say what holds."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import compiled, gpu, guided, memory, run, step
from benchmarks.__main__ import main
from benchmarks.flops import count_flops
from benchmarks.gpu import Part
from benchmarks.guided import (
    COMPILED,
    COMPILED_ROWS,
    DREAMCACHE,
    DREAMCACHE_JOINT,
    DREAMCACHE_TWO,
    TEXTBOOK,
    THREE_ROWS,
    TWO_ROWS,
    GuidedSteps,
    Settings,
    twin,
)
from benchmarks.memory import peak_bytes
from benchmarks.paper import count_step
from benchmarks.report import Bar, Report, publish
from benchmarks.timing import Spread, noise_warning

pytestmark = pytest.mark.diffusers

torch.set_num_threads(1)

CPU = torch.device("cpu")


@pytest.mark.parametrize(("batch", "references"), [(1, 1), (2, 3)])
def test_textbook_and_product_agree_in_value(batch: int, references: int):
    settings = Settings("tiny", 8, "float32", "cpu", batch, references)
    with GuidedSteps(settings).ready() as steps:
        values = {name: step() for name, step in steps.items()}
    assert values[DREAMCACHE].shape == (batch, 4, 8, 8)
    scale = float(values[TEXTBOOK].abs().max())
    torch.testing.assert_close(values[DREAMCACHE], values[TEXTBOOK], rtol=0, atol=1e-4 * scale)
    # what they agree on is not what the plain U-Net gives
    assert (values[DREAMCACHE] - values[THREE_ROWS]).abs().max() > 0.01 * scale
    # without references three rows are plain guidance: s_text * (e_ct - e_c) remains, as e_c = e_u
    torch.testing.assert_close(values[THREE_ROWS], values[TWO_ROWS], rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("image_guidance_scale", "name"),
    [(1.0, DREAMCACHE_TWO), (guided.TEXT_SCALE, DREAMCACHE_JOINT)],
)
def test_two_row_steps_are_the_textbook_at_scales_where_a_term_cancels(
    image_guidance_scale: float, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(guided, "IMAGE_SCALE", image_guidance_scale)
    with GuidedSteps(Settings("tiny", 8, "float32", "cpu", batch=2)).ready() as steps:
        two_rows, textbook = steps[name](), steps[TEXTBOOK]()
    scale = float(textbook.abs().max())
    torch.testing.assert_close(two_rows, textbook, rtol=0, atol=1e-4 * scale)


def test_a_twin_shares_weights_and_no_hooks():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    other = twin(module)
    for name, tensor in module.state_dict().items():
        assert other.state_dict()[name].data_ptr() == tensor.data_ptr()
    calls: list[str] = []
    other[0].register_forward_hook(lambda *_: calls.append("hook"))
    module[0](torch.ones(1, 3))
    assert calls == []


def test_peak_is_what_lives_at_once_of_what_was_made():
    given = torch.ones(1000, 1000)

    def action() -> None:
        first = given + 1  # 4 MB
        second = first.t()[:10] * 2  # a view, and 0.04 MB
        del first
        third = given.view(-1) - 1  # 4 MB more, when the first 4 MB are gone
        del second, third

    assert peak_bytes(action, CPU) == 4_040_000


@pytest.mark.parametrize("name", ["step", "encode", "memory", "growth", "load", "paper"])
def test_commands_print_tables_and_write_figures(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["--size", "tiny", "--rounds", "1", "--out", str(tmp_path)]
    status = main([name, *flags])
    out = capsys.readouterr().out
    figures = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert figures["settings"]["size"] == "tiny"
    missed = [bar for bar in figures["bars"] if not bar["holds"]]
    assert status == bool(missed)
    held = f"{len(figures['bars']) - len(missed)} of {len(figures['bars'])} bars hold."
    assert out.splitlines()[-1] == f"{name}: {held if figures['bars'] else 'nothing is promised.'}"
    assert (tmp_path / f"{name}.png").is_file() == (name not in ("memory", "load", "paper"))


def test_all_of_them_end_with_what_was_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(command, "MEASURES", {"step": step, "memory": memory})
    monkeypatch.setattr(command, "FULL_SIZE", ("memory",))
    monkeypatch.setattr(command, "ON_PAPER", ())
    monkeypatch.setattr(memory, "MOST_AT_PEAK_MB", -1.0)
    assert main(["all", "--size", "tiny", "--full", "tiny"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("All benchmarks: ")
    assert last.count("memory (tiny): peak of a step beyond the plain three rows, MB") == 2


def test_what_cannot_be_measured_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr(command, "MEASURES", {"run": run, "compiled": compiled, "memory": memory})
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert main(["all", "--size", "tiny", "--full", ""]) == 1
    said = capsys.readouterr()
    assert "run (tiny) is not measured: There is no ComfyUI in" in said.err
    assert said.out.splitlines()[-1] == (
        "All benchmarks: 2 of 2 bars hold; none missed; not measured: run (tiny), compiled."
    )


def test_growth_is_linear_in_the_reference_tokens(tmp_path: Path):
    main(["growth", "--size", "tiny", "--rounds", "1", "--out", str(tmp_path)])
    points = json.loads((tmp_path / "growth.json").read_text(encoding="utf-8"))["points"]
    by_name = {point["name"]: point for point in points}
    added = [
        by_name[f"{count} references"]["flops"] - by_name[f"{count} references"]["plain_flops"]
        for count in (1, 2, 4, 8)
    ]
    assert added[2] - added[1] == 2 * (added[1] - added[0])
    assert added[3] - added[2] == 4 * (added[1] - added[0])
    masked, whole = by_name["subject mask, 40%"], by_name["1 references"]
    assert masked["attention_flops"] < 0.5 * whole["attention_flops"]
    assert whole["flops"] - masked["flops"] == (
        whole["attention_flops"] - masked["attention_flops"]
    )


def test_operations_of_a_step_are_ordered(tmp_path: Path):
    main(["step", "--size", "tiny", "--rounds", "1", "--out", str(tmp_path)])
    flops = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))["flops"]
    assert flops[TWO_ROWS] < flops[THREE_ROWS] < flops[DREAMCACHE] < flops[TEXTBOOK]
    # the reference acts on two rows in both: what it adds is the same
    added = flops[DREAMCACHE] - flops[THREE_ROWS]
    assert flops[DREAMCACHE_TWO] - flops[TWO_ROWS] == added
    # with joint guidance on one
    assert 2 * (flops[DREAMCACHE_JOINT] - flops[TWO_ROWS]) == added


def test_paper_counts_what_the_benchmarks_that_compute_count():
    settings = Settings("tiny", 8, "float32", "cpu", batch=2, references=3)
    counted = count_step(settings)
    steps = GuidedSteps(settings)
    with steps.ready((DREAMCACHE, THREE_ROWS)) as actions:
        actions[DREAMCACHE]()
        flops = {name: count_flops(action) for name, action in actions.items()}
        peak = peak_bytes(actions[DREAMCACHE], CPU)
    assert counted["flops"] == flops[DREAMCACHE]
    assert counted["plain_flops"] == flops[THREE_ROWS]
    assert counted["adapters"] == steps.fused.nbytes
    assert counted["keys_values"] == 2 * steps.reference.nbytes
    assert counted["unet"] == sum(weight.nbytes for weight in steps.unet.parameters())
    assert abs(counted["peak"] / peak - 1) < 0.2


@pytest.mark.parametrize(
    ("low", "high", "is_noisy"),
    [(0.96, 1.04, False), (0.9, 1.0, True), (1.0, 1.1, True)],
)
def test_a_machine_on_which_the_same_differs_from_itself_is_said(
    low: float, high: float, is_noisy: bool
):
    lines = noise_warning(Spread(1.0, low, high))
    assert bool(lines) == is_noisy
    assert not lines or f"{low:.2f} to {high:.2f} times" in lines[0]


def test_a_missed_bar_is_said_and_fails(capsys: pytest.CaptureFixture[str]):
    bars = [Bar("kept", 1.0, 2.0), Bar("slow", 3.0, 2.0), Bar("fast", 3.0, 2.0, at_most=False)]
    assert publish(Report("name", "title", [], {}, bars), None) == 1
    out = capsys.readouterr().out
    assert "MISSED: slow: 3, at most 2" in out
    assert "holds: fast: 3, at least 2" in out
    assert out.splitlines()[-1] == "name: 2 of 3 bars hold."


def test_figures_are_kept_where_no_plot_can_be_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plotted = {"a": Spread(1.0, 1.0, 1.0)}
    assert publish(Report("name", "title", [], {}, plotted=plotted), tmp_path) == 0
    assert (tmp_path / "name.json").is_file()
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_what_a_generation_leaves_behind_is_counted(monkeypatch: pytest.MonkeyPatch):
    steps = GuidedSteps(Settings("tiny", 8, "float32", "cpu"))
    held = memory._held_after_generations(steps, 3)
    assert held[0] == held[2] > 0
    leaked: list[torch.Tensor] = []
    held_bytes = memory._held_bytes

    def leak(device: torch.device) -> int:
        leaked.append(torch.zeros(1000))
        return held_bytes(device)

    monkeypatch.setattr(memory, "_held_bytes", leak)
    held = memory._held_after_generations(steps, 3)
    assert held[2] - held[0] == 2 * 4000


@pytest.mark.slow
def test_a_compiled_step_gives_what_the_plain_one_gives():
    steps = GuidedSteps(Settings("tiny", 8, "float32", "cpu"))
    with steps.ready((DREAMCACHE, THREE_ROWS), backend="eager") as actions:
        values = {name: action() for name, action in actions.items()}
    torch._dynamo.reset()
    assert torch.equal(values[COMPILED], values[DREAMCACHE])
    assert torch.equal(values[COMPILED_ROWS], values[THREE_ROWS])


@pytest.mark.slow
def test_gpu_day_keeps_each_part_and_says_what_was_not_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    parts = (
        Part("memory", "sd21", "float16"),
        Part("memory", "sdxl", "float16"),  # of one size the same, so that it comes once
        Part("run", "sd15", "float32"),
        Part("step", "sd21", "bfloat16", limit_s=0),
    )
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert main(["gpu", "--device", "cpu", "--size", "tiny", "--out", str(tmp_path)]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    memory_part, run_part, step_part = summary["parts"]
    assert memory_part["outcome"] == "holds"
    assert memory_part["figures"]["settings"]["dtype"] == "float16"
    assert run_part["outcome"].startswith("not measured: There is no ComfyUI in")
    assert step_part["outcome"] == "cut off after 0 s"
    said = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "| memory-tiny-float16 |" in said
    assert "fused adapters" in said


def test_gpu_day_skips_what_has_no_time_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    clock = iter([0.0, 600.0])
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(gpu, "PARTS", (Part("step", "sd21", "float16"),))
    assert main(["gpu", "--device", "cpu", "--limit", "500", "--out", str(tmp_path)]) == 1
    assert "skipped: no time left" in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_every_part_of_the_gpu_day_is_a_command_that_exists():
    for part in gpu.PARTS:
        flags = ["--size", part.size, "--dtype", part.dtype, "--device", "cuda", *part.flags]
        assert command._parser().parse_args([part.benchmark, *flags]).size == part.size


@pytest.mark.parametrize(
    ("built_for", "message"),
    [("13.0", "torch finds no CUDA device here"), (None, "is built without CUDA. Install one")],
)
@pytest.mark.parametrize("name", ["step", "training", "gpu"])
def test_a_device_that_is_not_there_is_refused(
    name: str,
    built_for: str | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    assert main([name, "--device", "cuda"]) == 2
    assert message in capsys.readouterr().err
