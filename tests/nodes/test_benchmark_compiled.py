"""The benchmark of compiled steps runs in each ComfyUI; without a compiler here, so that it says nothing of times."""

import json
from pathlib import Path

from benchmarks.__main__ import main
from benchmarks.inside.compiled import COMPILED, OURS, PLAIN


def test_compiled_steps_are_measured_and_need_one_graph_each(comfyui, tmp_path: Path, capsys):
    flags = ["--backend", "eager", "--steps", "1", "--rounds", "1", "--out", str(tmp_path)]
    status = main(["compiled", *flags, "--comfyui", str(comfyui.path)])
    assert status in (0, 1), capsys.readouterr().err
    figures = json.loads((tmp_path / "compiled.json").read_text(encoding="utf-8"))
    assert set(figures["seconds"]) == {PLAIN, OURS, PLAIN + COMPILED, OURS + COMPILED}
    assert figures["graphs"] == 2
    assert figures["more_graphs"] == 0
