"""The measuring of adapters by their training steps."""

from pathlib import Path

import pytest
from PIL import Image

from dreamcache_core.demo.files import require_demo_files
from research.fitting import measure

pytestmark = [pytest.mark.diffusers, pytest.mark.slow]


def test_adapter_files_are_measured_beside_fitted_ones_and_plotted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plot = tmp_path / "steps.png"
    file = str(require_demo_files().adapters)
    measure(["--combinations", "4", "--seed", "1", "--adapters", file, "--plot", str(plot)])
    lines = capsys.readouterr().out.splitlines()[2:]
    names, groups, gaps = zip(*(line.split(" | ")[:3] for line in lines), strict=True)
    assert names == ("| other adapters, 4500 steps", "| fitted, 0 steps")
    assert set(groups) == {"combination"}
    trained, fitted = (float(gap.split()[0]) for gap in gaps)
    assert trained > fitted > 0
    with Image.open(plot) as image:
        assert image.size == (900, 540)
