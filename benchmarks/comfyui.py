"""Run a measurement inside a ComfyUI of this machine, with its own interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamcache_core.errors import InputError

if TYPE_CHECKING:
    import argparse


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Declare where ComfyUI is."""
    parser.add_argument(
        "--comfyui", type=Path, help="ComfyUI's folder; else COMFYUI_PATH's first, else ~/ComfyUI"
    )


def find_comfyui(given: Path | None) -> Path:
    """Return the folder that is given or usual.

    Args:
        given: Its folder, or ``None``.

    Raises:
        InputError: There is no ComfyUI in it.
    """
    named = os.environ.get("COMFYUI_PATH", "").split(os.pathsep)[0]
    folder = given or Path(named or Path.home() / "ComfyUI")
    if not (folder / "comfyui_version.py").is_file():
        raise InputError(
            f"There is no ComfyUI in {folder}. Give its folder by --comfyui or COMFYUI_PATH."
        )
    return folder


def measure_inside(comfyui: Path, module: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Execute a module of ``inside`` by ComfyUI's interpreter.

    Args:
        comfyui: ComfyUI's folder.
        module: Its name; it prints JSON on its last line.
        request: What it is to measure; ``comfyui`` is added.

    Returns:
        What it printed.

    Raises:
        InputError: It failed.
    """
    own = comfyui / ".venv" / "bin" / "python"
    python = str(own) if own.exists() else "python3"
    given = json.dumps({"comfyui": str(comfyui), **request})
    command = [python, "-m", f"{__package__}.inside.{module}", given]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        raise InputError(f"The measurement inside {comfyui} ended with {done.returncode}.")
    return json.loads(done.stdout.strip().splitlines()[-1])
