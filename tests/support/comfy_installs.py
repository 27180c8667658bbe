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
    def python(self) -> str:
        """The interpreter of its own environment, else ``python3``."""
        own = self.path / ".venv" / "bin" / "python"
        return str(own) if own.exists() else "python3"


def comfyui_folders() -> list[Path]:
    """Folders named by ``COMFYUI_PATH``, or else the usual ones; those that hold a ComfyUI."""
    given = os.environ.get("COMFYUI_PATH")
    home = Path.home()
    named = given.split(os.pathsep) if given else [home / "ComfyUI", home / "ComfyUI-0.3.64"]
    return [Path(path) for path in named if (Path(path) / "comfyui_version.py").exists()]
