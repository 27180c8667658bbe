"""Start a real ComfyUI server with the pack as a user installs it and tiny models in place of real ones; talk to it."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_installs import ComfyInstall
from PIL import Image

PACK = Path(__file__).parents[2]
PACK_FOLDER = "ComfyUI-DreamCache-main"  # as a downloaded archive unpacks: not the project's name
ADAPTERS = "cross_attention-25000.pt"
CHANNELS = {
    "middle_block.1": 128,
    "output_blocks.4.1": 128,
    "output_blocks.6.1": 64,
    "output_blocks.8.1": 64,
    "output_blocks.10.1": 32,
}
UP_WITHIN_S, DONE_WITHIN_S = 180, 180


@dataclass
class Server:
    """A running ComfyUI and the folder that it works in."""

    base: Path
    url: str
    version: str

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read()

    def get_json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post_json(self, path: str, content: Any) -> bytes:
        """Post; fail with the server's own words if it refuses."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(content).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            with error:
                pytest.fail(f"{path} was refused: {error.read().decode()}")

    def queue(self, prompt: dict[str, Any]) -> str:
        return json.loads(self.post_json("/prompt", {"prompt": prompt}))["prompt_id"]

    def refusal(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Queue what the server must refuse, and return its answer."""
        body = json.dumps({"prompt": prompt}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/prompt", body, headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        with refused.value as answer:
            return json.loads(answer.read())

    def wait(self, prompt_id: str) -> dict[str, Any]:
        """Wait until a prompt is over and return its history: outputs, and messages by kind."""
        deadline = time.monotonic() + DONE_WITHIN_S
        while time.monotonic() < deadline:
            history = self.get_json(f"/history/{prompt_id}")
            if prompt_id in history:
                entry = history[prompt_id]
                return {**entry, "messages": dict(entry["status"]["messages"])}
            time.sleep(0.1)
        pytest.fail(f"the prompt was not done within {DONE_WITHIN_S} s\n{self.log()}")

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Queue a prompt and wait for it; fail if a node does."""
        entry = self.wait(self.queue(prompt))
        assert entry["status"]["status_str"] == "success", entry["messages"]["execution_error"]
        return entry

    def saved_image(self, entry: dict[str, Any], node: str) -> np.ndarray:
        """The image that a SaveImage node wrote, from its file."""
        saved = entry["outputs"][node]["images"][0]
        assert saved["type"] == "output"
        with Image.open(self.base / "output" / saved["subfolder"] / saved["filename"]) as image:
            return np.asarray(image.convert("RGB"))

    def shown_image(self, shown: dict[str, str]) -> np.ndarray:
        """An image of a node's preview, as the page fetches it."""
        query = urllib.parse.urlencode(shown)
        with Image.open(io.BytesIO(self.get(f"/view?{query}"))) as image:
            return np.asarray(image.convert("RGB"))

    def adapter_choices(self) -> list[str]:
        info = self.get_json("/object_info/DreamCacheLoadAdapters")["DreamCacheLoadAdapters"]
        return info["input"]["required"]["adapters"][1]["options"]

    def skip_if_too_old_for(self, workflow: str) -> None:
        """Skip a test of a shipped workflow that needs a newer ComfyUI, as its name says."""
        needed = re.search(r"ComfyUI 0\.(\d+)", workflow)
        if needed and int(self.version.split(".")[1]) < int(needed[1]):
            pytest.skip(f"needs {needed[0]}")

    def log(self) -> str:
        return (self.base / "server.log").read_text(encoding="utf-8", errors="replace")


@contextmanager
def running_server(install: ComfyInstall, base: Path) -> Iterator[Server]:
    """Run a server that works in an empty folder; it is gone afterwards, whatever happens."""
    _furnish(base)
    port = _free_port()
    command = [install.python, "main.py", "--cpu", "--base-directory", str(base)]
    command += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
    command += ["--port", str(port), "--listen", "127.0.0.1"]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": _missing_modules(install)}
    with (base / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=install.path, env=env, stdout=log, stderr=subprocess.STDOUT
        )
    running = Server(base, f"http://127.0.0.1:{port}", install.version)
    try:
        _wait_until_up(running, process)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(base / "models" / "checkpoints", ignore_errors=True)


def write_adapters(path: Path, seed: int = 0) -> None:
    """Write random adapters of the tiny model's widths as the authors' file has them: 45 tensors."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn((rows, columns), generator=generator) / columns**0.5

    tensors = {}
    for layer, d in CHANNELS.items():
        block = f"diffusion_model.{layer}.transformer_blocks.0."
        for name in ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"):
            tensors[f"{block}attn_mem.{name}"] = matrix(d, d)
        tensors[f"{block}attn_mem.to_out.0.bias"] = torch.zeros(d)
        tensors[f"{block}norm2_mem.weight"] = torch.ones(d)
        tensors[f"{block}norm2_mem.bias"] = torch.zeros(d)
        tensors[f"{block}linear_cat.weight"] = matrix(d, 2 * d)
        tensors[f"{block}linear_cat.bias"] = torch.zeros(d)
    torch.save(tensors, path)


def _furnish(base: Path) -> None:
    """Lay out the folder as a user's: the pack installed, a photograph as a plain and as a cut-out PNG."""
    for folder in ("custom_nodes", "input", "output", "models/dreamcache", "user"):
        (base / folder).mkdir(parents=True)
    # nothing loads these: a page that opens a workflow only looks whether they are there
    for file in (
        "background_removal/birefnet.safetensors",
        "controlnet/control_v11p_sd15_canny_fp16.safetensors",
    ):
        (base / "models" / file).parent.mkdir()
        (base / "models" / file).touch()
    (base / "custom_nodes" / PACK_FOLDER).symlink_to(PACK, target_is_directory=True)
    tiny = base / "custom_nodes" / "tiny_models_pack"
    tiny.mkdir()
    for source in (Path(__file__).parent / tiny.name).glob("*.py"):
        # no file of the tests is called __init__.py: pytest would take the folder for a package
        shutil.copy(source, tiny / source.name.replace("entry.py", "__init__.py"))
    with Image.open(str(files("skimage") / "data" / "chelsea.png")) as photograph:
        photograph.save(base / "input" / "example.png")
        photograph.putalpha(_ellipse(*photograph.size))
        photograph.save(base / "input" / "cut_out.png")


def _ellipse(width: int, height: int) -> Image.Image:
    """An alpha channel: opaque around the cat's head, transparent elsewhere."""
    y, x = np.mgrid[:height, :width]
    inside = ((x - 0.45 * width) / 0.35 / width) ** 2 + ((y - 0.45 * height) / 0.4 / height) ** 2
    return Image.fromarray(np.where(inside < 1, 255, 0).astype(np.uint8), mode="L")


def _missing_modules(install: ComfyInstall) -> str:
    """A private folder with what a server needs and its own environment lacks; "" if nothing is.

    ComfyUI imports requests without asking for it: it used to come with other packages.
    """
    probe = [install.python, "-c", "import requests"]
    if subprocess.run(probe, capture_output=True).returncode == 0:
        return ""
    folder = Path(sys.prefix) / "comfy-server-modules"
    if not (folder / "requests").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder)]
        command += ["-c", str(PACK / "constraints.txt"), "requests"]
        subprocess.run(command, check=True)
    return str(folder)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait_until_up(server: Server, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + UP_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            server.get("/system_stats")
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"ComfyUI {server.version} did not start:\n{server.log()}")
