"""ComfyUI and the pack, loaded in this process."""

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

PACK = Path(__file__).parents[2]


def start_comfyui(folder: str, base: str, device: str) -> None:
    """Put ComfyUI first on the path and let it read its command line, as ``main.py`` does."""
    sys.path.insert(0, folder)
    sys.argv = ["main.py", "--base-directory", base, *(["--cpu"] if device == "cpu" else [])]
    import comfy.options

    comfy.options.enable_args_parsing()
    for name in ("input", "output", "temp", "models", "custom_nodes", "user"):
        Path(base, name).mkdir()


def load_pack() -> float:
    """Load the pack as ComfyUI does -> seconds, less what ComfyUI imports for whichever pack comes first."""
    import comfy_config.config_parser  # noqa: F401

    import nodes

    began = time.perf_counter()
    if not asyncio.run(nodes.load_custom_node(str(PACK))):
        raise SystemExit("ComfyUI could not load the pack.")
    return time.perf_counter() - began


def loaded_core() -> Any:
    """The core as the pack has loaded it."""
    return next(module for name, module in sys.modules.items() if name.endswith(".dreamcache_core"))
