"""Find ComfyUI installations and run the tests of ``inside/`` in each, with its own interpreter.

What runs inside imports ComfyUI's packages, some of which are called ``comfy`` and ``nodes``; it is a pytest run of its own.
"""

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from comfy_installs import WHY_NONE, ComfyInstall, comfyui_folders

HERE = Path(__file__).parent
INSIDE = HERE / "inside"
PACK = HERE.parents[1]
collect_ignore = ["inside"]


@dataclass
class ComfyUI(ComfyInstall):
    """One installation, and the results of the tests inside it once they ran."""

    seconds: float = 0.0
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
        constraints = PACK / "constraints.txt"
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "-c",
            str(constraints),
            "--target",
            str(folder),
        ]
        subprocess.run([*command, "pytest", "pytest-timeout"], check=True)
    return folder


@pytest.fixture(scope="session")
def run_inside(tools_folder, tmp_path_factory):
    """Run all tests of ``inside/`` in an installation, once."""

    def run(comfyui: ComfyUI) -> ComfyUI:
        if comfyui.cases:
            return comfyui
        base = tmp_path_factory.mktemp(f"comfy-{comfyui.version}")
        report = base / "report.xml"
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tools_folder), str(HERE.parent / "support")]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "COMFYUI_FOLDER": str(comfyui.path),
            "COMFYUI_BASE": str(base),
        }
        command = [
            comfyui.python,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-c",
            str(INSIDE / "pytest.ini"),
            f"--junitxml={report}",
        ]
        start = time.monotonic()
        done = subprocess.run(
            [*command, str(INSIDE)], env=env, cwd=INSIDE, capture_output=True, text=True
        )
        comfyui.seconds, comfyui.output = time.monotonic() - start, done.stdout + done.stderr
        assert report.exists(), f"pytest did not start in {comfyui.path}:\n{comfyui.output}"
        for case in ElementTree.parse(report).iter("testcase"):
            module = case.get("classname", "").split(".")[-1]
            comfyui.cases.setdefault(module, []).append(case)
        return comfyui

    return run


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
