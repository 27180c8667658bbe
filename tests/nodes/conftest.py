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
from comfy_installs import WHY_NONE, ComfyInstall, comfyui_folders
from demo_exchange import write_demo_model
from exchange import train_in_diffusers

HERE = Path(__file__).parent
INSIDE = HERE / "inside"
PACK = HERE.parents[1]
collect_ignore = ["inside"]


@dataclass
class ComfyUI(ComfyInstall):
    """One installation, and the results of the tests inside it once they ran."""

    output: str = ""
    cases: dict[str, list[ElementTree.Element]] = field(default_factory=dict)


COMFYUIS = [ComfyUI(path) for path in comfyui_folders()]


def pytest_generate_tests(metafunc):
    if "comfyui" in metafunc.fixturenames:
        marks = [] if COMFYUIS else [pytest.mark.skip(reason=WHY_NONE)]
        params = COMFYUIS or [pytest.param(None, marks=marks, id="none")]
        metafunc.parametrize(
            "comfyui", params, ids=lambda c: c.version if c else "none", scope="session"
        )


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
    """Run all tests of ``inside/`` in every installation, side by side."""
    bases = [tmp_path_factory.mktemp(f"comfy-{comfyui.version}") for comfyui in COMFYUIS]
    with ThreadPoolExecutor() as pool:
        list(pool.map(partial(run_tests, tools_folder, exchange), COMFYUIS, bases))


def run_tests(tools: Path, exchange: Path, comfyui: ComfyUI, base: Path) -> None:
    report = base / "report.xml"
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tools), str(HERE.parent / "support")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "COMFYUI_FOLDER": str(comfyui.path),
        "COMFYUI_BASE": str(base),
        "EXCHANGE_FOLDER": str(exchange),
    }
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
                f"inside ComfyUI {comfyui.version}: {(lines or ['no summary'])[-1]}"
            )
