"""The README's Python example and shell commands run as they are written."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_diffusers import random_adapters
from tiny_pipeline import tiny_pipeline

from dreamcache_core.cli.main import main
from dreamcache_core.method.backends import layout_of

pytestmark = pytest.mark.diffusers

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
RELEASED = {
    "norm": "norm2_mem",
    "to_q": "attn_mem.to_q",
    "to_k": "attn_mem.to_k",
    "to_v": "attn_mem.to_v",
    "to_out": "attn_mem.to_out.0",
    "merge": "linear_cat",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the README speaks of, tiny."""
    monkeypatch.chdir(tmp_path)
    pipeline = tiny_pipeline(tmp_path, context_width=1024)
    pipeline.save_pretrained("path/to/stable-diffusion-2-1-base")
    adapters = random_adapters(layout_of(pipeline.unet))
    weights = {}
    for layer in adapters:
        for name, value in adapters[layer].state_dict().items():
            module, kind = name.rsplit(".", 1)
            weights[f"diffusion_model.{layer}.transformer_blocks.0.{RELEASED[module]}.{kind}"] = (
                value
            )
    torch.save(weights, "cross_attention-25000.pt")
    dog = Image.new("RGBA", (90, 70), (0, 0, 0, 0))
    dog.paste((200, 120, 40, 255), (20, 20, 70, 50))
    dog.save("dog.png")
    return tmp_path


def test_the_python_example_runs(folder):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    with Image.open("beach.png") as image:
        assert image.size == (64, 64)


def test_the_commands_run(folder, capsys):
    shell = README.replace("\\\n", " ")
    commands = re.findall(r"^ +\.venv/bin/python -m dreamcache_core (.+)$", shell, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["generate", "inspect", "convert"]
    for command in commands:
        assert main(shlex.split(command)) == 0, capsys.readouterr().err
    assert len(list(Path("results").glob("*_seed_*.png"))) == 4
    assert Path("dreamcache-sd21.safetensors").exists()
