"""The trainer on a tiny real model: what it promises about numbers, files and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from training_set import save_base_model, write_captioned, write_pairs

from dreamcache_core import InputError, StateError, load_adapters
from dreamcache_core.cli.main import main
from dreamcache_core.cli.parsing import read_toml
from dreamcache_core.fitting.fit import FITTED, FitSettings
from dreamcache_core.pipeline.fitting import adapters_from_model
from dreamcache_core.pipeline.loading import load_diffusers_pipeline
from dreamcache_core.pipeline.pipeline import DreamCachePipeline
from dreamcache_core.processes import Interruption
from dreamcache_core.training import loop
from dreamcache_core.training.config import TrainConfig
from dreamcache_core.training.run import open_run, precision

pytestmark = pytest.mark.diffusers

ROOT = Path(__file__).parents[2]
# the same number of threads as here: sums of another order would not be the same to the bit
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture
def settings(model, data, tmp_path):
    """Fields of a short run."""
    return {
        "model": str(model),
        "data": str(data),
        "out": str(tmp_path / "run"),
        "init": "identity",
        "steps": 4,
        "batch_size": 2,
        "learning_rate": 0.01,
        "workers": 0,
        "checkpoint_every": 0,
        "validate_every": 0,
        "tracker": "none",
        "log_every": 1,
    }


def train(settings, **changes) -> dict[str, torch.Tensor]:
    config = TrainConfig.from_dict({**settings, **changes})
    return load_file(loop.train(open_run(config)))


def flags(settings) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def run_process(settings, *launcher: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, "-m", "dreamcache_core", "train", *flags(settings)]
    return subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)


def break_image(data: Path, image: Path | None = None) -> Path:
    """Cut off an image of a set."""
    image = image or data / "subject_1" / "001_generation.png"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    return image


def largest_difference(first, second) -> float:
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def losses(settings) -> list[float]:
    lines = (Path(settings["out"]) / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


# --- numbers


def test_the_same_settings_give_the_same_adapters_and_another_seed_others(settings, tmp_path):
    first = train(settings)
    torch.manual_seed(99)
    assert largest_difference(first, train(settings, out=str(tmp_path / "again"))) == 0
    assert largest_difference(first, train(settings, out=str(tmp_path / "other"), seed=1)) > 1e-3


def test_workers_read_the_same_samples(settings, tmp_path):
    first = train(settings)
    assert largest_difference(first, train(settings, out=str(tmp_path / "w"), workers=2)) == 0


def test_accumulated_batches_equal_one_large_batch(settings, tmp_path):
    settings = {**settings, "steps": 20, "learning_rate": 1e-4}
    large = train(settings, batch_size=8)
    small = train(settings, batch_size=2, gradient_accumulation=4, out=str(tmp_path / "small"))
    assert largest_difference(large, small) < 1e-5
    assert largest_difference(large, untrained(settings)) > 1e-3


def test_two_processes_equal_one_with_the_same_global_batch(settings, tmp_path):
    settings = {**settings, "steps": 20, "learning_rate": 1e-4}
    one = train(settings, batch_size=8)
    two = {**settings, "batch_size": 4, "out": str(tmp_path / "two")}
    done = run_process(two, *TWO_PROCESSES)
    assert done.returncode == 0, done.stderr
    assert "8 samples a step on 2 processes" in done.stdout
    both = load_file(tmp_path / "two" / "adapters.safetensors")
    assert largest_difference(one, both) < 1e-5
    assert largest_difference(one, untrained(settings)) > 1e-3
    assert losses({"out": tmp_path / "two"}) == pytest.approx(losses(settings), rel=1e-4)


def untrained(settings) -> dict[str, torch.Tensor]:
    """Adapters as a run starts with them, by the keys of its file."""
    adapters = open_run(
        TrainConfig.from_dict({**settings, "out": settings["out"] + "-none"})
    ).module.adapters
    return {
        f"{layer}.{name}": weight.detach()
        for layer in adapters
        for name, weight in adapters[layer].state_dict().items()
    }


@pytest.mark.parametrize("option", [{}, {"ema_decay": 0.5, "lr_schedule": "cosine"}])
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(settings, tmp_path, option):
    settings = {**settings, "steps": 6, "checkpoint_every": 2, **option}
    whole = train(settings, out=str(tmp_path / "whole"))
    killed = {**settings, "out": str(tmp_path / "killed")}
    kill_after_checkpoint(killed, step=4)
    resumed = train(killed, resume=True)
    assert largest_difference(whole, resumed) == 0
    assert losses(killed) == losses({"out": tmp_path / "whole"})


def kill_after_checkpoint(settings, step: int) -> None:
    """Start a run of many steps in another process and kill it without warning."""
    code = f"""
import os, signal, sys
from dreamcache_core.cli import main
from dreamcache_core.training import loop as module
finish = module.Loop.finish_step
def finish_and_die(loop):
    finish(loop)
    if loop.step == {step + 1}:
        os.kill(os.getpid(), signal.SIGKILL)
module.Loop.finish_step = finish_and_die
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, "train", *flags(settings)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    names = [path.name for path in (Path(settings["out"]) / "checkpoints").iterdir()]
    assert f"step-{step:06d}" in names


def test_sigterm_saves_and_resume_goes_on(settings, tmp_path):
    settings = {**settings, "steps": 400, "learning_rate": 1e-5}
    settings["workers"] = 2
    command = [sys.executable, "-m", "dreamcache_core", "train", *flags(settings)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = Path(settings["out"]) / "log.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)  # as batch systems do, its reading processes too
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "stopping as soon as all is saved" in errors
    assert "--resume" in errors
    (checkpoint,) = (Path(settings["out"]) / "checkpoints").iterdir()
    done = int(checkpoint.name.removeprefix("step-"))
    assert len(losses(settings)) == done < 400
    load_adapters(checkpoint / "adapters.safetensors")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sdxl"])
@pytest.mark.parametrize("init", ["identity", "self_attention"])
def test_losses_start_at_the_base_models_own(settings, tmp_path, kind, init):
    settings["init"] = init
    if kind != "epsilon":
        settings["model"] = str(save_base_model(tmp_path / kind, sdxl=kind == "sdxl"))
    if kind == "v_prediction":
        predict_v(Path(settings["model"]))
    # upright images and targets, so that swapped sides show
    data = write_pairs(tmp_path / "upright", 4, size=(80, 160))
    settings |= {"data": str(data), "buckets": True, "resolution": 192, "steps": 1}
    settings["caption_dropout"] = 0.5
    train(settings)
    plain = base_model_loss(TrainConfig.from_dict(settings))
    assert losses(settings)[0] == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "fit"),
    [
        ({}, {}),
        ({"timestep": 40, "seed": 5, "layers": ["middle_block.1"]}, {}),
        ({"init": "self_attention"}, {"reference_share": 0, "query_scale": 1}),
    ],
    ids=["default", "otherwise", "self_attention"],
)
def test_training_starts_from_adapters_fitted_to_the_model(settings, changes, fit):
    del settings["init"]
    settings |= {"steps": 1, "learning_rate": 1e-12, "resolution": 64, **changes}
    train(settings)
    trained = load_adapters(Path(settings["out"]) / "adapters.safetensors")
    pipeline = DreamCachePipeline(load_diffusers_pipeline(settings["model"], dtype=torch.float32))
    expected = adapters_from_model(
        pipeline,
        layers=changes.get("layers"),
        settings=FitSettings(changes.get("timestep", 300), **fit),
        size=64,
        seed=changes.get("seed", 0),
    )
    torch.testing.assert_close(
        dict(trained.state_dict()), dict(expected.state_dict()), rtol=1e-4, atol=1e-6
    )
    assert trained.info.timestep == expected.info.timestep
    assert FITTED not in trained.info.extra


def test_a_fit_can_be_stopped(settings, caplog):
    interruption = Interruption()
    interruption.is_requested = True
    run = open_run(TrainConfig.from_dict({**settings, "init": "fitted"}))
    with pytest.raises(KeyboardInterrupt):
        loop.Loop(run, interruption)
    assert loop.NOTHING_YET in caplog.text


def test_targets_are_noised_to_min_timestep_at_least(settings):
    drawn = {}
    for least in (0, 990):
        run = open_run(TrainConfig.from_dict({**settings, "min_timestep": least, "steps": 50}))
        batches = run.data.loader(run.config, 0, run.global_batch, 4)
        drawn[least] = torch.cat([batch["timestep"] for batch in batches])
    assert drawn[0].min() < 500
    assert drawn[990].unique().tolist() == list(range(990, 1000))


def test_a_folder_and_a_model_are_enough_and_the_settings_are_kept(
    model, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = 'a dog \U0001f436, "wet"'
    few = [
        f"--caption={words}",
        "--steps=1",
        "--init=identity",
        "--workers=0",
        "--validate_every=0",
        "--tracker=none",
    ]
    assert main(["train", str(data), "--model", str(model), *few]) == 0
    folder = Path("runs") / data.name
    assert (folder / "adapters.safetensors").is_file()
    assert "resume" not in (folder / "run.toml").read_text(encoding="utf-8")
    kept = TrainConfig.from_dict(read_toml(folder / "run.toml"))
    assert kept == TrainConfig(
        str(model), data=str(data), caption=words, out=str(folder), steps=1, init="identity", workers=0,
        validate_every=0, tracker="none",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("has_gpu", "has_bf16", "asked", "set_up", "expected"),
    [
        (False, False, "auto", None, None),
        (True, True, "auto", None, "bf16"),
        (True, False, "auto", None, "fp16"),
        (True, True, "auto", "no", None),
        (True, True, "no", None, "no"),
    ],
)
def test_precision_is_the_devices_unless_one_is_asked_for(
    monkeypatch, has_gpu, has_bf16, asked, set_up, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    if set_up is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", set_up)
    config = TrainConfig("model", data="data", mixed_precision=asked)
    assert precision(config) == expected


def test_losses_start_elsewhere_with_paper(settings, tmp_path):
    train(settings)
    train(settings, init="paper", out=str(tmp_path / "paper"))
    assert abs(losses(settings)[0] - losses({"out": tmp_path / "paper"})[0]) > 1e-3


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("max_train_steps", "called 'steps'"),
        ("train_batch_size", "called 'batch_size'"),
        ("resume_from_checkpoint", "called 'resume'"),
        ("lr_scheduler", "called 'lr_schedule'"),
        ("report_to", "called 'tracker'"),
        ("xformers", "not needed"),
    ],
)
def test_names_of_other_trainers_are_answered_with_ours(settings, name, here, capsys):
    assert main(["train", *flags(settings), f"--{name}=1"]) == 2
    message = capsys.readouterr().err
    assert here in message
    assert "TrainConfig" not in message


def test_all_wrong_names_are_answered_at_once(settings, capsys):
    habits = ["--train_data_dir=x", "--network_dim", "32", "--output_dir=o"]
    assert main(["train", *flags(settings), *habits]) == 2
    message = capsys.readouterr().err
    for answer in ("called 'data'", "Adapters have no rank", "called 'out'"):
        assert answer in message


def test_every_answer_names_a_setting():
    known = {field.name for field in fields(TrainConfig)}
    named = {answer.split("'")[1] for answer in TrainConfig.elsewhere.values() if "'" in answer}
    assert named <= known
    assert known.isdisjoint(TrainConfig.elsewhere)


def predict_v(model: Path) -> None:
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))


def base_model_loss(config: TrainConfig) -> float:
    """Loss of the first batch without adapters, written as METHOD.md section 7 reads."""
    run = open_run(TrainConfig.from_dict({**config.to_dict(), "out": config.out + "-plain"}))
    batch = next(iter(run.data.loader(config, 0, run.global_batch, 4)))
    base, pipeline = run.base, run.base.pipeline.pipeline
    latent = base.encode_images(batch["target"])
    assert tuple(latent.shape[2:]) == (32, 16)
    alpha = base.scheduler.alphas_cumprod[batch["timestep"]][:, None, None, None]
    pairs = zip(batch["is_dropped"], batch["caption"], strict=True)
    states, _, *pooled = pipeline.encode_prompt(
        ["" if is_dropped else caption for is_dropped, caption in pairs],
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    added = None
    if pooled:
        ids = torch.tensor([[256.0, 128, 0, 0, 256, 128]] * len(latent))
        added = {"text_embeds": pooled[0], "time_ids": ids}
    noise = batch["noise"]
    noised = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
    target = noise
    if base.scheduler.config.prediction_type == "v_prediction":
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latent
    with torch.no_grad():
        predicted = base.unet(noised, batch["timestep"], states, added_cond_kwargs=added).sample
    return float((predicted - target).square().mean())


def test_min_snr_clipping_and_checkpointing_have_their_effect(settings, tmp_path):
    settings["min_timestep"] = 0  # above 400 signal-to-noise ratios are below any gamma
    plain = train(settings)
    number = iter(range(9))

    def other(**changes):
        return largest_difference(
            plain, train(settings, out=str(tmp_path / f"{next(number)}"), **changes)
        )

    assert other(min_snr_gamma=1.0) > 1e-4
    assert other(optimizer="SGD", weight_decay=0.0) > 1e-4
    assert other(caption_dropout=1.0) > 1e-4
    assert other(gradient_checkpointing=True) < 1e-6


def test_references_are_cached_under_the_caption_only_if_asked_for(settings, tmp_path):
    settings |= {"init": "paper", "steps": 1}  # with identity the first step sees no reference
    train(settings, out=str(tmp_path / "empty"), caption_dropout=0.0)
    asked = {"reference_caption": True}
    train(settings, out=str(tmp_path / "caption"), caption_dropout=0.0, **asked)
    train(settings, out=str(tmp_path / "dropped"), caption_dropout=1.0, **asked)
    train(settings, out=str(tmp_path / "no caption"), caption_dropout=1.0)
    empty, caption, dropped, none = (
        losses(settings | {"out": str(tmp_path / name)})
        for name in ("empty", "caption", "dropped", "no caption")
    )
    assert empty != caption
    assert dropped == none


def test_moving_average_lags_behind_the_weights(settings, tmp_path):
    last = train(settings, init="paper")
    average = train(settings, init="paper", ema_decay=0.9, out=str(tmp_path / "average"))
    untrained = train(settings, init="paper", learning_rate=1e-12, out=str(tmp_path / "none"))
    key = "middle_block.1.merge.weight"
    lag = float((average[key] - untrained[key]).norm() / (last[key] - untrained[key]).norm())
    assert 0.05 < lag < 0.95


def test_adapters_stay_in_float32_under_mixed_precision(settings, tmp_path):
    plain = train(settings)
    mixed = {**settings, "mixed_precision": "bf16", "out": str(tmp_path / "mixed")}
    done = run_process(mixed)
    assert done.returncode == 0, done.stderr
    adapters = load_file(tmp_path / "mixed" / "adapters.safetensors")
    assert {weight.dtype for weight in adapters.values()} == {torch.float32}
    assert 0 < largest_difference(plain, adapters) < 0.1
    assert losses(mixed) == pytest.approx(losses(settings), rel=0.05)


def test_sdxl_trains_and_validates(tmp_path, data, settings):
    model = save_base_model(tmp_path / "sdxl", sdxl=True)
    adapters = train(settings, model=str(model), steps=2, validate_every=2, validation_steps=2,
                     validation_samples=1)  # fmt: skip
    assert any("output_blocks.5.1" in key for key in adapters)
    assert (tmp_path / "run" / "validation" / "step-000002.png").exists()


def test_adapters_say_what_their_base_model_predicts(tmp_path, settings):
    model = save_base_model(tmp_path / "v")
    predict_v(model)
    train(settings, model=str(model), steps=1)
    adapters = load_adapters(tmp_path / "run" / "adapters.safetensors")
    assert adapters.info.prediction == "v_prediction"


# --- files


def test_adapters_carry_settings_and_base_model_but_no_folders(settings, tmp_path, model):
    train(settings)
    info = load_adapters(tmp_path / "run" / "adapters.safetensors").info
    training = json.loads(info.extra["training"])
    assert training["learning_rate"] == 0.01
    assert training["step"] == 4
    assert training["model"] == info.base_model == "model"
    assert str(tmp_path) not in json.dumps(dict(info.extra))
    assert len(info.extra["base_model_fingerprint"]) == 64


def test_training_goes_on_from_an_adapter_file(settings, tmp_path):
    first = train(settings)
    file = str(tmp_path / "run" / "adapters.safetensors")
    second = train(settings, adapters=file, learning_rate=1e-12, out=str(tmp_path / "second"))
    assert largest_difference(first, second) < 1e-6


def test_validation_grids_and_curves_are_written_and_change_nothing(settings, tmp_path):
    plain = train(settings)
    watched = {"validate_every": 2, "validation_steps": 2, "validation_samples": 2,
               "tracker": "tensorboard", "validation_prompts": ["a"]}  # fmt: skip
    assert largest_difference(plain, train(settings, out=str(tmp_path / "w"), **watched)) == 0
    grids = sorted(path.name for path in (tmp_path / "w" / "validation").iterdir())
    assert grids == ["step-000000.png", "step-000002.png", "step-000004.png"]
    assert list((tmp_path / "w").rglob("events.out.tfevents*"))


def test_dry_run_prints_the_plan_and_writes_nothing(settings, tmp_path, capsys):
    assert main(["train", *flags(settings), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    count = sum(w.numel() for w in train(settings).values())
    assert f"trainable parameters: {count:,}" in plan
    assert "steps: 4 (2 samples a step on 1 process, 1.3 epochs)" in plan
    assert "device: cpu, float32" in plan
    assert "MiB" in plan


def test_a_folders_name_cannot_forge_lines_of_the_plan(settings, tmp_path, capsys):
    odd = {**settings, "out": str(tmp_path / "a\x1b[31m\nsteps: forged")}
    assert main(["train", *flags(odd), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "\x1b" not in plan
    assert r"a\x1b[31m\nsteps: forged" in plan


def test_dry_run_finds_what_the_run_would(settings, tmp_path, capsys, caplog, monkeypatch):
    data = write_pairs(tmp_path / "set", 5)
    break_image(data)
    mask = data / "subject_0" / "000_mask.png"
    ImageOps.invert(Image.open(mask)).save(mask)
    settings = {**settings, "data": str(data)}
    assert main(["train", *flags(settings), "--dry-run"]) == 0
    assert "unreadable files (1): subject_1/001" in caplog.text
    assert "masks of the background, turned round (1): subject_0/000" in caplog.text
    (tmp_path / "taken").write_text("")
    for out, reason in ((tmp_path / "taken", "no folder"), (tmp_path / "locked", "read-only")):
        if reason == "read-only":
            monkeypatch.setattr(os, "access", lambda *_: False)
        assert main(["train", *flags({**settings, "out": str(out)}), "--dry-run"]) == 2
        assert reason in capsys.readouterr().err


def test_a_run_within_its_set_is_refused_before_anything_is_written(settings, tmp_path, capsys):
    data = write_pairs(tmp_path / "set", 5)
    before = sorted(data.rglob("*"))
    for out in (data, data / "runs" / "first", tmp_path / "set" / ".." / "set" / "run"):
        for more in (["--dry-run"], []):
            # said before anything is loaded
            odd = {**settings, "model": "nowhere", "data": str(data), "out": str(out)}
            assert main(["train", *flags(odd), *more]) == 2
            assert "Expected --out to be outside of the set" in capsys.readouterr().err
    assert sorted(data.rglob("*")) == before


def test_the_end_of_a_run_says_how_to_use_its_file(settings, data, tmp_path, capsys):
    assert main(["train", *flags(settings)]) == 0
    finished = capsys.readouterr().out.splitlines()[-1]
    assert "ComfyUI/models/dreamcache" in finished
    interpreter, _, command = finished.partition(" background: ")[2].partition(
        " -m dreamcache_core "
    )
    assert interpreter == sys.executable
    shown = {
        "IMAGE": str(next(data.rglob("*_generation.png"))),
        "results": str(tmp_path / "results"),
    }
    assert main([*(shown.get(word, word) for word in command.split()), "--steps", "1"]) == 0
    assert list((tmp_path / "results").glob("*_seed_*.png"))


# --- bad input


def test_misspelt_keys_are_refused_and_the_nearest_named(settings, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text('learning_rat = 0.1\nmodel = "m"\n')
    assert main(["train", "--config", str(file)]) == 2
    assert "'learning_rate'" in capsys.readouterr().err
    assert main(["train", *flags(settings), "--stpes=3"]) == 2
    assert "'steps'" in capsys.readouterr().err


def test_flags_override_the_file(settings, tmp_path, capsys):
    file = tmp_path / "run.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    file.write_text("\n".join(lines))
    assert main(["train", "--config", str(file), "--steps", "7", "--dry-run"]) == 0
    assert "steps: 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data": None}, "data .* or encoded"),
        ({"encoded": "e", "buckets": True}, "give buckets to 'dataset encode'"),
        ({"warmup_steps": 2}, "constant_with_warmup"),
        ({"lr_schedule": "linear", "warmup_steps": 4}, "warmup_steps must be below steps"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"seed": 10**30}, "seed must be in 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"caption_dropout": 1.5}, "caption_dropout must be in 0"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma must be above 0"),
        ({"optimizer": "AdamX"}, "no optimizer 'AdamX'"),
        ({"layers": ["middle_block.9"]}, "no attention layer middle_block.9"),
        ({"resolution": 60}, "resolution .*multiple of 8"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(
    settings, tmp_path, wrong, message
):
    with pytest.raises((InputError, ImportError, ValueError), match=message):
        open_run(TrainConfig.from_dict({**settings, **wrong}))
    assert not (tmp_path / "run").exists()


def test_processes_that_know_nothing_of_each_other_are_refused(settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StateError, match=r"started 2 processes.*ACCELERATE_USE_CPU"):
        open_run(TrainConfig.from_dict(settings))


def test_a_tracker_that_is_not_installed_is_not_left_out_silently(settings, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ImportError, match="tensorboard is not installed"):
        open_run(TrainConfig.from_dict({**settings, "tracker": "tensorboard"}))


def test_a_loss_of_nan_stops_with_step_files_and_checkpoint(settings, tmp_path):
    settings = {**settings, "steps": 60, "checkpoint_every": 1, "max_grad_norm": 0.0,
                "optimizer": "SGD", "weight_decay": 0.0}  # fmt: skip
    with pytest.raises(StateError, match=r"step \d+ .*_generation\.png.*last good checkpoint is"):
        train(settings, learning_rate=1e9)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    load_adapters(newest / "adapters.safetensors")  # refuses NaN and infinity


@pytest.mark.parametrize("changes", [{"seed": 5}, {"batch_size": 4}, {"learning_rate": 0.5}])
def test_a_run_resumes_with_its_own_settings_only(settings, changes):
    settings = {**settings, "checkpoint_every": 2}
    train(settings)
    with pytest.raises(InputError, match="cannot be resumed with other settings"):
        open_run(TrainConfig.from_dict({**settings, **changes, "resume": True}))


def test_a_run_resumes_on_its_own_model_and_data_only(settings, tmp_path):
    train({**settings, "checkpoint_every": 2})
    more = {**settings, "resume": True, "data": str(write_pairs(tmp_path / "more", 8))}
    with pytest.raises(InputError, match=r"training set is not .*: 2 new \(subject_0/006, sub"):
        open_run(TrainConfig.from_dict(more))
    torch.manual_seed(1)
    other = save_base_model(tmp_path / "other")
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    with pytest.raises(InputError, match="base model was"):
        open_run(TrainConfig.from_dict({**settings, "resume": True, "model": str(other)}))


@pytest.mark.parametrize("name", ["optimizer.bin", "model.safetensors"])
def test_a_damaged_checkpoint_from_before_there_were_digests_is_named_on_resume(settings, name):
    train({**settings, "checkpoint_every": 2})
    newest = Path(settings["out"]) / "checkpoints" / "step-000004"
    (newest / "contents.json").unlink()
    content = (newest / name).read_bytes()
    (newest / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"step-000004 is damaged: .*goes on from .*step-000002"):
        train({**settings, "resume": True, "steps": 6})


def test_a_run_is_not_resumed_to_fewer_steps_than_it_has(settings):
    train({**settings, "checkpoint_every": 2})
    with pytest.raises(InputError, match="has 4 steps behind it, and steps = 3"):
        train({**settings, "resume": True, "steps": 3})


@pytest.mark.parametrize(
    "failure", [MemoryError(), OSError(28, "No space left"), RuntimeError("out of memory")]
)
def test_a_failing_grid_stops_nothing(settings, tmp_path, monkeypatch, caplog, failure):
    settings = {**settings, "checkpoint_every": 2, "validate_every": 2, "validation_steps": 1}
    run = open_run(TrainConfig.from_dict(settings))
    drawn = []

    def fail_later(adapters, _):
        drawn.append(adapters)
        if len(drawn) == 2:
            raise failure
        return torch.zeros(1, 8, 8, 3)

    monkeypatch.setattr(run.validation, "draw", fail_later)
    loop.train(run)
    assert f"grid of step 2 could not be drawn ({type(failure).__name__}" in caplog.text
    grids = (tmp_path / "run" / "validation").iterdir()
    assert sorted(grid.name for grid in grids) == ["step-000000.png", "step-000004.png"]
    load_adapters(tmp_path / "run" / "adapters.safetensors")


def test_grids_come_early_and_a_request_to_stop_ends_one(settings, monkeypatch):
    monkeypatch.setattr(loop, "EARLY_GRIDS", (1, 2))
    settings = {**settings, "validate_every": 4, "validation_steps": 1, "validation_samples": 2}
    run, interruption, drawn = open_run(TrainConfig.from_dict(settings)), Interruption(), []
    run.begin()
    assert run.validation is not None
    sample = run.validation._sample

    def ask_in_the_second_grid(*arguments):
        drawn.append(arguments)
        interruption.is_requested = len(drawn) == 5
        return sample(*arguments)

    monkeypatch.setattr(run.validation, "_sample", ask_in_the_second_grid)
    with pytest.raises(KeyboardInterrupt):
        loop.Loop(run, interruption).train()
    assert len(drawn) == 5  # of the first grid 4, of the next the first
    assert [path.name for path in (run.folder / "validation").iterdir()] == ["step-000000.png"]
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step-000002"]


def test_a_run_that_is_stopped_in_its_first_grid_begins_anew(settings, monkeypatch, caplog):
    settings = {**settings, "validate_every": 4, "validation_steps": 1, "steps": 1}
    run, interruption = open_run(TrainConfig.from_dict(settings)), Interruption()
    run.begin()
    assert run.validation is not None
    sample = run.validation._sample

    def ask(*arguments):
        interruption.is_requested = True
        return sample(*arguments)

    monkeypatch.setattr(run.validation, "_sample", ask)
    with pytest.raises(KeyboardInterrupt):
        loop.Loop(run, interruption).train()
    assert loop.NOTHING_YET in caplog.text
    assert run.checkpoints.newest() is None
    train(settings)
    assert (run.folder / "validation" / "step-000000.png").exists()


def test_the_learning_rate_that_is_logged_is_the_steps_own(settings, tmp_path):
    train(settings, lr_schedule="linear")
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_a_resumed_run_may_be_longer_and_split_otherwise(settings):
    train({**settings, "checkpoint_every": 2})
    longer = {**settings, "resume": True, "steps": 6, "batch_size": 1, "gradient_accumulation": 2}
    train(longer)
    assert len(losses(settings)) == 6


def test_a_folder_with_a_run_is_not_overwritten(settings):
    train(settings)
    for lost in ({}, {"model": "nowhere"}):  # it is said before anything is loaded
        with pytest.raises(StateError, match="--resume"):
            open_run(TrainConfig.from_dict({**settings, **lost}))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_and_the_next_takes_its_place(
    settings, tmp_path, workers, caplog
):
    data = write_pairs(tmp_path / "set", 5)
    settings = {**settings, "data": str(data), "workers": workers, "steps": 9}
    settings |= {"validate_every": 9, "validation_steps": 1, "validation_samples": 4}
    break_image(data)
    weights = train(settings)
    assert "unreadable files (1)" in caplog.text
    (named,) = {text for text in caplog.messages if "Another takes its place" in text}
    assert "001_generation.png" in named
    again = train(settings, out=str(tmp_path / "again"))
    assert largest_difference(weights, again) == 0


def test_a_damaged_image_that_is_repeated_often_gives_way_to_another(settings, tmp_path, caplog):
    data = write_captioned(tmp_path / "set", 6)
    for number in (0, 1):
        (data / f"subject_{number}").rename(data / f"{39 * number + 1}_subject")
        (data / "masks" / f"subject_{number}").rename(data / "masks" / f"{39 * number + 1}_subject")
    for image in sorted((data / "40_subject").glob("*.png"))[:2]:
        image.write_bytes(b"")
    train({**settings, "data": str(data), "buckets": True, "steps": 9})
    assert "unreadable files (2)" in caplog.text


def test_a_set_without_a_readable_image_is_refused_by_both_processes(settings, tmp_path):
    data = write_pairs(tmp_path / "set", 5)
    for image in data.rglob("*_generation.png"):
        break_image(data, image)
    settings = {**settings, "data": str(data), "batch_size": 1, "steps": 9}
    done = run_process(settings, *TWO_PROCESSES)
    assert done.returncode != 0
    assert "cannot be used" in done.stderr
    assert "dataset check" in done.stderr


def test_a_copied_or_mended_set_is_resumed_on(settings, tmp_path, caplog):
    data = write_pairs(tmp_path / "set", 5)
    settings = {**settings, "data": str(data), "checkpoint_every": 2}
    image = break_image(data)
    train(settings)
    copy = shutil.copytree(data, tmp_path / "copy", copy_function=shutil.copyfile)
    longer = {**settings, "resume": True, "steps": 6}
    assert load_file(loop.train(open_run(TrainConfig.from_dict({**longer, "data": str(copy)}))))
    Image.new("RGB", (96, 80)).save(image)
    (data / "subject_0" / "004_caption.txt").unlink()
    longer["steps"] = 8
    with pytest.raises(
        InputError, match=r"1 changed \(subject_1/001\); 1 gone \(subject_0/004\).*--accept"
    ):
        train(longer)
    train(longer, accept_changed_data=True)
    assert "has changed since the run was begun: 1 changed" in caplog.text
    train({**longer, "steps": 10})  # what was accepted is what the run is on
    break_image(data)
    caplog.clear()
    train({**longer, "steps": 12}, accept_changed_data=True)
    assert "unreadable files (1)" in caplog.text


def test_processes_that_see_different_checkpoints_are_refused(settings, tmp_path):
    settings = {**settings, "batch_size": 1, "out": str(tmp_path / "run0")}
    done = run_process({**settings, "steps": 2}, *TWO_PROCESSES)
    assert done.returncode == 0, done.stderr
    script = tmp_path / "own_folders.py"  # as on two machines without a shared file system
    script.write_text(
        "import os, sys\n"
        "from dreamcache_core.cli.main import main\n"
        f"out = r'{tmp_path / 'run'}' + os.environ['RANK']\n"
        "sys.exit(main(['train', *sys.argv[1:], '--out', out, '--resume']))\n"
    )
    env = {**ENV, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *TWO_PROCESSES, str(script), *flags(settings)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "do not see what process 0 writes" in done.stderr


def test_too_little_disk_is_said_before_training(settings, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="MiB are free there"):
        train(settings)


def test_long_captions_are_counted_once(settings, tmp_path, caplog):
    data = write_pairs(tmp_path / "set", 3)
    (data / "subject_0" / "000_caption.txt").write_text("abc " * 50)
    open_run(TrainConfig.from_dict({**settings, "data": str(data)}))
    assert caplog.text.count("1 of 3 captions are longer") == 1
