"""docs/training.md and training_large.md: commands and examples run as they are written, figures and messages are the code's."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from tiny_segmenters import save_clipseg, save_grounding_dino, save_sam
from training_set import save_base_model, write_captioned
from transformers import CLIPTextConfig

from dreamcache_core import load_adapters
from dreamcache_core.cli.main import main
from dreamcache_core.cli.parsing import parse_config
from dreamcache_core.data.sources.opening import open_source
from dreamcache_core.data.synthetic.options import BuildOptions
from dreamcache_core.training.config import TrainConfig

pytestmark = pytest.mark.diffusers

ROOT = Path(__file__).parents[2]
GUIDE = "\n".join(
    (ROOT / "docs" / page).read_text(encoding="utf-8")
    for page in ("training.md", "training_large.md")
)
BIN = ".venv/bin/"
USE_CPU = "ACCELERATE_USE_CPU=true "

SHORT_RUN = "--steps 2 --validation_steps 1 --validation_samples 1 --workers 0"
# random masks are scattered, and of any size
TINY_BUILD = (
    "--count 2 --steps 1 --cpu --mask_threshold 0.6 --min_main_share 0 --min_area 0 --max_area 1 "
    "--allow_border"
)
ADDED = {
    "train images": f"{SHORT_RUN} --validate_every 0",
    "train --config run.toml": SHORT_RUN,
    "train --config run.toml --dry-run": "",
    "train --config run.toml --resume": f"{SHORT_RUN} --steps 3 --validate_every 0",
    "train --config run.toml --encoded": f"{SHORT_RUN} --validate_every 0",
    "train --config run.toml --out runs/two": "--dry_run",  # test_training.py trains on two
    "dataset encode": "--reference_variants 2",
    "dataset build": TINY_BUILD,
    "dataset masks": "--cpu --mask_threshold 0.3",
    "generate": "--steps 1",
}
"""Flags that make a command small, by its longest beginning."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def block(language: str, containing: str) -> str:
    (found,) = (text for text in blocks(language) if containing in text)
    return found


def commands() -> list[str]:
    """Every command of the guide, in its order."""
    shell = re.sub(r"```.*?```", "", GUIDE, flags=re.DOTALL).replace("\\\n", " ")
    indented = re.findall(r"^ {4,}(\S.*)$", shell, re.MULTILINE)
    return [" ".join(line.split()) for line in indented if not line.startswith("images/")]


def short(command: str) -> list[str]:
    """Arguments of ``dreamcache``, with what makes them small."""
    beginning = max((key for key in ADDED if command.startswith(key)), key=len, default=None)
    return shlex.split(f"{command} {ADDED[beginning] if beginning else ''}")


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch):
    """The precision of one run would else be that of the next."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the guide speaks of, tiny."""
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    save_base_model(tmp_path).rename("models/stable-diffusion-2-1-base")
    write_captioned(Path("images"), 20)
    for number, text in enumerate(blocks("toml")):
        name = ("run.toml", "paper.toml")[number]
        assert text.startswith(f"# {name}\n")
        Path(name).write_text(text, encoding="utf-8")
    return tmp_path


def test_the_commands_run_in_the_order_of_the_guide(folder, capfd):
    shutil.copytree("models/stable-diffusion-2-1-base", "models/stable-diffusion-xl-base-1.0")
    save_clipseg(Path("models/clipseg-rd64-refined"))
    save_grounding_dino(Path("models/grounding-dino-base"))
    save_sam(Path("models/sam-vit-base"))
    shutil.copy("images/subject_0/000.png", "photo.png")
    shutil.copy("images/masks/subject_0/000.png", "photo_mask.png")
    Path("images/masks/subject_0/002.png").unlink()
    Path("path/to/ComfyUI/models/dreamcache").mkdir(parents=True)
    for command in commands():
        run(command, capfd)
    assert Path("images/masks/subject_0/002.png").exists()
    assert len(open_source("shards").keys) == 20
    assert Path("check.png").exists()
    assert Path("runs/first/validation/step-000002.png").exists()
    assert list(Path("runs").rglob("events.out.tfevents.*"))  # what TensorBoard would show
    assert load_adapters("runs/encoded/adapters.safetensors").layers
    adapters = load_adapters("path/to/ComfyUI/models/dreamcache/my_adapters.safetensors")
    assert '"step": 3' in adapters.info.extra["training"]
    assert len(open_source("synthetic").keys) == 2
    assert list(Path("results").glob("*_seed_*.png"))
    exec(compile(block("python", "load_adapters(") + "\n", "training.md", "exec"), {})
    assert "custom-32 stable-diffusion-2-1-base" in capfd.readouterr().out


def run(command: str, capfd) -> None:
    """Run a command, or at least read it where it wants GPUs or people."""
    if command.startswith(f"{BIN}python -m dreamcache_core "):
        _, _, rest = command.partition("dreamcache_core ")
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main(short(rest)) == 0, capfd.readouterr().err
    elif command.startswith(f"{BIN}accelerate launch "):
        require_launchable(command.removeprefix(f"{BIN}accelerate launch "))
    elif command.startswith(f"{USE_CPU}{BIN}torchrun "):
        launch_on_cpus(command.removeprefix(f"{USE_CPU}{BIN}torchrun "))
    elif command.startswith("cp "):
        _, source, target = shlex.split(command)
        shutil.copy(source, target)
    else:
        assert command in (
            "make setup",
            f"{BIN}accelerate config",
            f"{BIN}tensorboard --logdir runs",
        )


def require_launchable(arguments: str) -> None:
    """Both parsers know what they are given, and a step takes 128 samples."""
    launched = launch_command_parser().parse_args(shlex.split(arguments))
    assert (launched.module, launched.training_script) == (True, "dreamcache_core")
    name, *flags = launched.training_script_args
    if name == "train":
        config = parse_config(TrainConfig, flags, program="train")
        processes = launched.num_processes or 8  # what the answers to accelerate's questions are
        assert config.batch_size * config.gradient_accumulation * processes == 128
        return
    assert [name, *flags] == ["dataset", "build", "--config", "build.toml"]
    keys = {"out": "x", "model": "y", "segmenter_model": "z", "allow_border": True}
    assert BuildOptions.from_dict(keys).allow_border


def test_the_slurm_script_launches_what_the_paper_took(folder):
    (line,) = re.findall(r"accelerate launch (.*?)'\n", block("bash", "#SBATCH"), re.DOTALL)
    numbers = {"$((SLURM_NNODES * 8))": "16", "$SLURM_NNODES": "2", "$SLURM_NODEID": "0"}
    for variable, value in {**numbers, "$HEAD": "10.0.0.1", "\\\n": " "}.items():
        line = line.replace(variable, value)
    require_launchable(line)


def launch_on_cpus(arguments: str) -> None:
    launcher, _, command = arguments.partition("dreamcache_core ")
    words = [sys.executable, "-m", "torch.distributed.run", *launcher.split(), "dreamcache_core"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*words, *short(command)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "8 samples a step on 2 processes" in done.stdout


def test_the_paper_recipe_is_the_papers():
    paper = tomllib.loads(block("toml", "# paper.toml"))
    assert paper["batch_size"] * paper["gradient_accumulation"] * 8 == 128
    config = TrainConfig.from_dict(paper)
    found = (config.steps, config.learning_rate, config.resolution, config.caption_dropout)
    assert found == (25_000, 1e-5, 512, 0.07)


def test_the_manifests_are_read(tmp_path):
    photo = Image.new("RGB", (80, 64), (90, 90, 100))
    mask = Image.new("L", (80, 64))
    mask.paste(255, (20, 10, 60, 50))
    cutout = photo.convert("RGBA")
    cutout.putalpha(mask)
    for image, name in ((photo, "bag.jpg"), (mask, "bag_mask.png"), (cutout, "bag_cutout.png")):
        image.save(tmp_path / name)
    for suffix, text in (("csv", blocks("csv")), ("jsonl", blocks("json"))):
        (tmp_path / f"set.{suffix}").write_text(text[0], encoding="utf-8")
        pair = open_source(tmp_path / f"set.{suffix}").read(0)
        assert pair.caption == "a red bag, on a beach"
        assert pair.mask is not None
        assert pair.mask.sum() == 40 * 40


def first_column(heading: str) -> list[str]:
    """What stands between backticks in the first column of the tables below a heading."""
    (section,) = re.findall(rf"## {heading}\n(.+?)(?=\n##|\Z)", GUIDE, re.DOTALL)
    rows = re.findall(r"^\|.*", section, re.MULTILINE)
    return [text for row in rows for text in re.findall("`([^`]+)`", row.split("|")[1])]


def test_every_setting_is_explained():
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    assert sorted(first_column("All settings")) == sorted(fields)


def test_every_message_is_one_of_the_code():
    source = "\n".join(p.read_text(encoding="utf-8") for p in ROOT.glob("dreamcache_core/**/*.py"))
    quoted = first_column("When something goes wrong")
    assert len(quoted) > 25
    assert [text for text in quoted if text not in source] == []


# --- figures, at full size


@pytest.fixture
def full_size(tmp_path, monkeypatch):
    """The configurations of SD 2.1, without weights."""
    monkeypatch.chdir(tmp_path)
    folder = Path("models/stable-diffusion-2-1-base")
    with torch.device("meta"):
        UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
        ).save_config(folder / "unet")
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        ).save_config(folder / "vae")
    CLIPTextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        projection_dim=512,
    ).save_pretrained(folder / "text_encoder")


def figures_printed_by(script: str, capsys) -> list[str]:
    exec(compile(block("python", script), "training.md", "exec"), {})
    return re.findall(r": ([\d.,]+)", capsys.readouterr().out)


def row(beginning: str) -> list[str]:
    (found,) = re.findall(rf"^{re.escape(beginning)}(.*) \|$", GUIDE, re.MULTILINE)
    return found.split(" | ")


def test_the_memory_script_prints_the_figures_of_the_table(full_size, capsys):
    _, _, _, plain_of_4, _, checkpointed_of_4 = row("| SD 2.1, 512 px | bf16 | ")
    assert figures_printed_by("estimate_saved_bytes", capsys) == [plain_of_4, checkpointed_of_4]


def test_the_script_of_counts_prints_the_figures_of_the_table(full_size, capsys):
    *counts, precomputed, without_references, from_images = row("| SD 2.1, 512 px | 1.")
    counts[0] = f"1.{counts[0]}"
    assert figures_printed_by("count_flops", capsys) == counts
    vae, caption, *passes = map(float, counts)
    assert f"{sum(passes):.2f}" == precomputed
    assert f"{sum(passes) + vae:.2f}" == without_references
    assert f"{sum(passes) + 2 * vae + caption:.2f}" == from_images
