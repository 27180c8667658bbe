"""Find ComfyUI installations and run the tests of ``inside/`` in each, with its own interpreter.

What runs inside imports ComfyUI's packages, some of which are called ``comfy`` and ``nodes``; it is a pytest run of its own.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from comfy_installs import WHY_NONE, ComfyInstall, oldest_and_newest
from demo_exchange import write_demo_model
from exchange import train_in_diffusers

HERE = Path(__file__).parent
INSIDE = HERE / "inside"
PACK = HERE.parents[1]
collect_ignore = ["inside"]


@dataclass
class ComfyUI(ComfyInstall):
    """One installation in one mode, and the results of the tests inside it once they ran.

    Attributes:
        vram: Bytes of a device with dynamic VRAM, less than most of the tests' models have; ``None`` without.
    """

    vram: int | None = None
    output: str = ""
    cases: dict[str, list[ElementTree.Element]] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.version if self.vram is None else f"{self.version}-dynamic"

    @property
    def files(self) -> list[str]:
        """Test files that run in this mode."""
        files = sorted(path.stem for path in INSIDE.glob("test_*.py"))
        return [file for file in files if file != "test_dynamic_vram" or self.vram]


FOLDERS = oldest_and_newest()
PLAIN = [ComfyUI(folder) for folder in FOLDERS]
COMFYUIS = [ComfyUI(c.path, 24_000_000) for c in PLAIN[-1:] if c.has_dynamic_vram] + PLAIN


def pytest_generate_tests(metafunc):
    none = pytest.mark.skip(reason=WHY_NONE)
    if "inside_file" in metafunc.fixturenames:
        pairs = [
            pytest.param((comfyui, file), id=f"{comfyui}-{file}")
            for comfyui in COMFYUIS
            for file in comfyui.files
        ]
        metafunc.parametrize(
            "inside_file", pairs or [pytest.param(None, marks=none, id="none")], scope="session"
        )
    elif "comfyui" in metafunc.fixturenames:
        params = PLAIN or [pytest.param(None, marks=none, id="none")]
        metafunc.parametrize("comfyui", params, ids=str, scope="session")


def pytest_collection_modifyitems(items):
    for item in items:
        if "ran_inside" in item.fixturenames:  # whichever comes first waits for all
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def tools_folder() -> Path:
    """Test tools for interpreters that lack them, in a private folder of our own environment."""
    folder = Path(sys.prefix) / "comfy-tools"
    if not (folder / "pytest").exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "-c", str(PACK / "constraints.txt")]
        subprocess.run([*pip, "--target", str(folder), "pytest", "pytest-timeout"], check=True)
    return folder


@pytest.fixture(scope="session")
def exchange(tmp_path_factory) -> Path:
    """Folder through which models and adapters go from diffusers to ComfyUI and back."""
    folder = tmp_path_factory.mktemp("exchange")
    train_in_diffusers(folder)
    write_demo_model(folder)
    return folder


@pytest.fixture(scope="session")
def ran_inside(tools_folder, exchange, tmp_path_factory) -> None:
    """Run all tests of ``inside/`` in every installation and mode, side by side."""
    bases = [tmp_path_factory.mktemp(f"comfy-{comfyui}") for comfyui in COMFYUIS]
    with ThreadPoolExecutor() as pool:
        list(pool.map(partial(run_tests, tools_folder, exchange), COMFYUIS, bases))


def run_tests(tools: Path, exchange: Path, comfyui: ComfyUI, base: Path) -> None:
    report = base / "report.xml"
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tools), str(HERE.parent / "support")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "COMFYUI_FOLDER": str(comfyui.path),
        "COMFYUI_BASE": str(base),
        "EXCHANGE_FOLDER": str(exchange),
    }
    if comfyui.vram is not None:
        env["COMFYUI_DYNAMIC_VRAM"] = str(comfyui.vram)
    options = ["-q", "-rs", "-c", str(INSIDE / "pytest.ini"), f"--junitxml={report}", str(INSIDE)]
    command = [comfyui.python, "-m", "pytest", *options]
    done = subprocess.run(command, env=env, cwd=INSIDE, capture_output=True, text=True)
    comfyui.output = done.stdout + done.stderr
    assert report.exists(), f"pytest did not start in {comfyui.path}:\n{comfyui.output}"
    for case in ElementTree.parse(report).iter("testcase"):
        module = case.get("classname", "").split(".")[-1]
        comfyui.cases.setdefault(module, []).append(case)


def pytest_terminal_summary(terminalreporter):
    for comfyui in COMFYUIS:
        if comfyui.cases:
            lines = [
                line
                for line in comfyui.output.splitlines()
                if " passed" in line or " failed" in line
            ]
            terminalreporter.write_line(
                f"inside ComfyUI {comfyui}: {(lines or ['no summary'])[-1]}"
            )
