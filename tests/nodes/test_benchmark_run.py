"""The benchmark of a whole image runs in each ComfyUI and measures what it says."""

import json
from pathlib import Path

from benchmarks.__main__ import main
from benchmarks.inside.run import (
    ENCODE,
    JOINT,
    OURS,
    PLAIN,
    STEP_OURS,
    STEP_PLAIN,
    THREE,
    TIMED,
    WATCHED_STEPS,
    WITHOUT_THIRD,
)


def test_a_run_is_measured(comfyui, tmp_path: Path, capsys):
    flags = [
        "--size",
        "small",
        "--latent",
        "8",
        "--steps",
        "2",
        "--rounds",
        "1",
        "--dtype",
        "bfloat16",
    ]
    status = main(["run", *flags, "--comfyui", str(comfyui.path), "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert status in (0, 1), capsys.readouterr().err
    assert figures["dtype"] == "bfloat16"
    assert set(figures["seconds"]) == {*TIMED, ENCODE}
    assert set(figures["step_seconds"]) == {STEP_PLAIN, STEP_OURS}
    watched = figures["watched"]
    rows = {name: counts["rows"] / WATCHED_STEPS for name, counts in watched.items()}
    assert rows == {PLAIN: 2, THREE: 3, OURS: 3, WITHOUT_THIRD: 2, JOINT: 2}
    assert watched[PLAIN]["adapters"] == watched[PLAIN]["keys_values"] == 0
    for name in (OURS, WITHOUT_THIRD, JOINT):
        assert watched[name]["adapters"] > 0
        assert watched[name]["keys_values"] == 2 * figures["cached_values"]
    assert figures["own_python_s"][0] > 0
    by_name = {bar["what"]: bar for bar in figures["bars"]}
    reads = by_name["reads of the device a step, more than plain"]
    ranged = by_name["the same with ranges"]
    assert reads["holds"], reads
    assert ranged["value"] == 1, "the noise level, once a step"


def test_no_comfyui_is_said(tmp_path: Path, capsys):
    assert main(["run", "--comfyui", str(tmp_path)]) == 2
    assert "There is no ComfyUI in" in capsys.readouterr().err
