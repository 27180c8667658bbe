"""The benchmark of a whole image runs in each ComfyUI and measures what it says."""

import json
from pathlib import Path

from benchmarks.__main__ import main
from benchmarks.inside_comfyui import OURS, PLAIN, STEP_OURS, STEP_PLAIN, THREE


def test_a_run_is_measured(comfyui, tmp_path: Path, capsys):
    flags = ["--size", "small", "--latent", "8", "--steps", "2", "--rounds", "1"]
    status = main(["run", *flags, "--comfyui", str(comfyui.path), "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert status in (0, 1), capsys.readouterr().err
    assert set(figures["seconds"]) == {PLAIN, THREE, OURS}
    assert set(figures["step_seconds"]) == {STEP_PLAIN, STEP_OURS}
    # two steps; the bar of 1 ms a step is for an idle machine
    assert 0 < figures["own_python_s"][0] < 2 * 0.01
    by_name = {bar["what"]: bar for bar in figures["bars"]}
    reads = by_name["reads of the device a step, more than plain"]
    ranged = by_name["the same with ranges"]
    assert reads["holds"], reads
    assert ranged["value"] == 1, "the noise level, once a step"


def test_no_comfyui_is_said(tmp_path: Path, capsys):
    assert main(["run", "--comfyui", str(tmp_path)]) == 2
    assert "There is no ComfyUI in" in capsys.readouterr().err
