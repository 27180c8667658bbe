"""Find the ComfyUI installations of this machine; used by every tier that needs a real one."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

WHY_NONE = "no ComfyUI found: set COMFYUI_PATH to its folder (several: separate them as in PATH)"


@dataclass(eq=False)
class ComfyInstall:
    """One ComfyUI folder and the interpreter that runs it."""

    path: Path

    @property
    def version(self) -> str:
        text = (self.path / "comfyui_version.py").read_text(encoding="utf-8")
        found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text)
        return found[1] if found else "unknown"

    @property
    def has_dynamic_vram(self) -> bool:
        """Whether it can load weights as they are used, which it does by default on NVIDIA cards."""
        patcher = (self.path / "comfy" / "model_patcher.py").read_text(encoding="utf-8")
        return "class ModelPatcherDynamic" in patcher

    @property
    def python(self) -> str:
        """The interpreter of its own environment, else ``python3``."""
        own = self.path / ".venv" / "bin" / "python"
        return str(own) if own.exists() else "python3"


def comfyui_folders() -> list[Path]:
    """Folders named by ``COMFYUI_PATH``, or else the usual ones; those that hold a ComfyUI, oldest first."""
    given = os.environ.get("COMFYUI_PATH")
    usual = [Path.home() / name for name in ("ComfyUI", "ComfyUI-0.3.64", "ComfyUI-0.33.0")]
    named = [Path(path) for path in given.split(os.pathsep)] if given else usual
    found = [path for path in named if (path / "comfyui_version.py").exists()]
    return sorted(found, key=lambda path: _numbers(ComfyInstall(path).version))


def oldest_and_newest() -> list[Path]:
    """Of the folders that were found, those at the ends of the range that is supported."""
    found = comfyui_folders()
    return list(dict.fromkeys([*found[:1], *found[-1:]]))


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
