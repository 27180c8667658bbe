"""DreamBench from end to end with tiny real models and a made-up set of its layout."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_diffusers import random_adapters
from tiny_judges import save_clip, save_dino, save_image, save_mask
from tiny_pipeline import tiny_pipeline, tokenizer, wrap
from transformers import CLIPModel, ViTModel

from dreamcache_core import save_adapters
from dreamcache_core.cli.evaluate import run
from dreamcache_core.cli.parsing import parse_config
from dreamcache_core.errors import FileFormatError, InputError, UnsupportedModelError
from dreamcache_core.evaluation.dreambench.options import DreamBenchOptions
from dreamcache_core.evaluation.image_metrics import ClipEncoder, DinoEncoder

pytestmark = pytest.mark.diffusers

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
COLUMNS = ("dino", "clip_i", "clip_t", "masked_dino", "masked_clip_i")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Judges, a set of two subjects, and images of them that another method could have made."""
    folder = tmp_path_factory.mktemp("dreambench")
    save_dino(folder / "dino")
    save_clip(folder / "clip")
    for name, seeds in (("mug", (1, 2, 3)), ("rex", (4, 5))):
        for index, seed in enumerate(seeds):
            save_image(folder / "set" / name / f"{index:02d}.png", seed)
    save_mask(folder / "set" / "mug" / "00_mask.png")
    save_mask(folder / "set" / "mug" / "02_mask.png")
    (folder / "subjects.csv").write_text("subject,class,kind\nmug,mug,object\nrex,dog,live\n")
    (folder / "objects.txt").write_text("a {} here\na red {}\n")
    (folder / "live.txt").write_text("a {} in a hat\n")
    for seed, name in enumerate(("mug/00_0", "mug/00_1", "mug/01_0", "rex/00_0", "rex/00_1"), 10):
        save_image(folder / "images" / f"{name}.png", seed, side=48)
    save_mask(folder / "images" / "mug" / "01_0_mask.png", side=48)
    return folder


def evaluate(files, out, *more, **changes):
    values = {
        "dataset": files / "set",
        "out": out,
        "dino": files / "dino",
        "clip": files / "clip",
        "images": files / "images",
        "subject_list": files / "subjects.csv",
        "object_prompts": files / "objects.txt",
        "live_prompts": files / "live.txt",
        "images_per_prompt": 2,
        **changes,
    }
    flags = [f"--{key}={value}" for key, value in values.items() if value is not None]
    run(parse_config(DreamBenchOptions, [*flags, "--cpu", *more], program="dreambench"))


def table(out, name="images"):
    with (out / f"{name}.csv").open(newline="") as stream:
        key = "image" if name == "images" else "name"
        return {row[key]: row for row in csv.DictReader(stream)}


def log_lines(out):
    return sum(len(path.read_text().splitlines()) for path in out.glob("scores-*.jsonl"))


@pytest.fixture(scope="module")
def judged(files):
    """The results of one undisturbed run."""
    evaluate(files, files / "judged", batch_size=2)
    return files / "judged"


def image_of(path):
    with Image.open(path) as opened:
        return opened.convert("RGB")


def normalised(path):
    """The judges' own input, without their processors: (1, 3, 32, 32) in [-1, 1]."""
    small = image_of(path).resize((32, 32), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, 32, 32, 3).permute(0, 3, 1, 2) / 127.5 - 1


def cosine(one, other):
    return float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0))


@torch.inference_mode()
def test_dino_is_the_mean_cosine_of_class_tokens_over_the_real_images(files, judged):
    model = ViTModel.from_pretrained(files / "dino", add_pooling_layer=False).eval()

    def token(path):
        return model(normalised(path)).last_hidden_state[0, 0]

    image = token(files / "images/mug/00_1.png")
    real = [token(files / f"set/mug/{index:02d}.png") for index in range(3)]
    expected = sum(cosine(image, one) for one in real) / 3
    row = table(judged)["mug/00_1.png"]
    assert float(row["dino"]) == pytest.approx(expected, abs=1e-4)
    assert abs(expected) < 0.99  # the judge tells these images apart


@torch.inference_mode()
def test_clip_i_and_clip_t_are_cosines_in_clips_common_space(files, judged):
    model = CLIPModel.from_pretrained(files / "clip").eval()
    words = tokenizer(files / "words")
    tokens = words("a dog in a hat", truncation=True, return_tensors="pt")

    def outputs(path):
        return model(pixel_values=normalised(path), **tokens)

    image = outputs(files / "images/rex/00_0.png")
    real = [outputs(files / f"set/rex/{index:02d}.png") for index in range(2)]
    row = table(judged)["rex/00_0.png"]
    expected = sum(cosine(image.image_embeds, one.image_embeds) for one in real) / 2
    assert float(row["clip_i"]) == pytest.approx(expected, abs=1e-4)
    text = cosine(image.image_embeds, image.text_embeds)
    assert float(row["clip_t"]) == pytest.approx(text, abs=1e-4)
    assert row["prompt"] == "a dog in a hat"


def test_an_image_equal_to_the_only_real_image_scores_one(files, tmp_path):
    for name in ("set/mug/00.png", "images/mug/00_0.png"):
        save_image(tmp_path / name, 7)
    places = {"dataset": tmp_path / "set", "images": tmp_path / "images"}
    evaluate(files, tmp_path / "out", **places)
    row = table(tmp_path / "out")["mug/00_0.png"]
    assert float(row["dino"]) == pytest.approx(1, abs=1e-5)
    assert float(row["clip_i"]) == pytest.approx(1, abs=1e-5)


def test_two_real_images_judge_each_other(files, judged):
    rows = table(judged)
    pair = [float(rows[f"real/rex/0{index}.png"]["dino"]) for index in range(2)]
    encoder = DinoEncoder(files / "dino", CPU)
    one, other = encoder.images([image_of(files / f"set/rex/0{i}.png") for i in range(2)])
    assert pair == pytest.approx([float(one @ other)] * 2, abs=1e-5)
    assert {rows[f"real/rex/0{index}.png"]["clip_t"] for index in range(2)} == {""}


def test_masked_scores_ignore_the_background(files, judged, tmp_path):
    rows = table(judged)
    masked = {name for name, row in rows.items() if row["masked_dino"]}
    assert masked == {"mug/01_0.png", "real/mug/00.png", "real/mug/02.png"}
    shutil.copytree(files / "images", tmp_path / "images")
    with Image.open(files / "images/mug/01_0.png") as opened:
        changed = Image.new("RGB", opened.size, "lime")
        changed.paste(opened.crop((8, 8, 40, 40)), (8, 8))
    changed.save(tmp_path / "images/mug/01_0.png")
    evaluate(files, tmp_path / "out", images=tmp_path / "images")
    before, after = rows["mug/01_0.png"], table(tmp_path / "out")["mug/01_0.png"]
    for name in ("masked_dino", "masked_clip_i"):
        assert float(after[name]) == pytest.approx(float(before[name]), abs=1e-5)
    assert abs(float(after["dino"]) - float(before["dino"])) > 1e-3


def test_an_empty_mask_leaves_the_masked_scores_out_and_says_so(files, tmp_path, caplog):
    shutil.copytree(files / "images", tmp_path / "images")
    Image.new("L", (48, 48), 0).save(tmp_path / "images/mug/01_0_mask.png")
    evaluate(files, tmp_path / "out", images=tmp_path / "images")
    assert table(tmp_path / "out")["mug/01_0.png"]["masked_dino"] == ""
    assert "01_0.png gets no masked scores" in caplog.text


def test_the_tables_are_means_over_images_and_then_over_subjects(judged):
    rows = {n: r for n, r in table(judged).items() if not n.startswith("real/")}
    means = {}
    for name in ("mug", "rex"):
        own = [float(row["clip_t"]) for row in rows.values() if row["subject"] == name]
        means[name] = sum(own) / len(own)
        assert float(table(judged, "subjects")[name]["clip_t"]) == pytest.approx(means[name])
    overall = table(judged, "overall")
    assert float(overall["all subjects"]["clip_t"]) == pytest.approx(sum(means.values()) / 2)
    assert float(overall["objects"]["clip_t"]) == pytest.approx(means["mug"])
    assert overall["real images"]["images"] == "5"


def test_the_report_shows_references_images_and_what_is_missing(judged):
    page = (judged / "report.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 2 + 3  # the first image of each prompt
    assert "5 of 6 images are there" in page
    assert "a red mug | DINO" in page
    assert "1 of 2 references have no mask beside them (rex)" in page


def test_folders_that_the_list_lacks_are_named(files, tmp_path, caplog):
    shutil.copytree(files / "set", tmp_path / "set")
    shutil.copytree(files / "set" / "rex", tmp_path / "set" / "tom")
    (tmp_path / "set" / "notes").mkdir()
    evaluate(files, tmp_path / "out", dataset=tmp_path / "set")
    assert "1 folders of" in caplog.text
    assert "does not have them: tom." in caplog.text


def test_a_damaged_image_is_named_with_its_subject(files, tmp_path):
    shutil.copytree(files / "images", tmp_path / "images")
    damaged = tmp_path / "images" / "rex" / "00_1.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(FileFormatError, match=r"images/rex/00_1\.png"):
        evaluate(files, tmp_path / "out", images=tmp_path / "images")


def test_what_is_judged_is_not_judged_again(files, judged, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(judged, out)
    lines = (out / "scores-00000.jsonl").read_text().splitlines(keepends=True)
    (out / "scores-00000.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    evaluate(files, out, batch_size=2)
    assert log_lines(out) == len(lines) + 1
    assert (out / "overall.csv").read_text() == (judged / "overall.csv").read_text()
    evaluate(files, out, batch_size=2)
    assert log_lines(out) == len(lines) + 1


def test_a_changed_image_or_judge_is_judged_again(files, judged, tmp_path):
    out, images = tmp_path / "out", tmp_path / "images"
    shutil.copytree(judged, out)
    shutil.copytree(files / "images", images)
    num_lines = log_lines(out)
    save_image(images / "rex" / "00_0.png", 99)
    evaluate(files, out, images=images)
    assert log_lines(out) == num_lines + 1
    assert table(out)["rex/00_0.png"]["dino"] != table(judged)["rex/00_0.png"]["dino"]
    dino = save_dino(tmp_path / "dino", num_hidden_layers=1)
    evaluate(files, out, images=images, dino=dino)
    assert log_lines(out) == 2 * num_lines + 1
    before = table(out)["rex/00_0.png"]["dino"]
    same_size = save_dino(tmp_path / "other", seed=1, num_hidden_layers=1) / "model.safetensors"
    assert same_size.stat().st_size == (dino / "model.safetensors").stat().st_size
    shutil.copyfile(same_size, dino / "model.safetensors")
    evaluate(files, out, images=images, dino=dino)
    assert log_lines(out) == 3 * num_lines + 1
    assert table(out)["rex/00_0.png"]["dino"] != before


@pytest.mark.slow
def test_launched_processes_share_the_work(files, judged, tmp_path):
    script = tmp_path / "judge.py"
    script.write_text(
        "import sys\nfrom dreamcache_core.cli import main\nsys.exit(main(['evaluate', 'dreambench', *sys.argv[1:]]))\n"
    )
    flags = {"dataset": "set", "dino": "dino", "clip": "clip", "images": "images"}
    flags |= {"subject_list": "subjects.csv"}
    flags |= {"object_prompts": "objects.txt", "live_prompts": "live.txt"}
    command = [sys.executable, str(script), *(f"--{k}={files / v}" for k, v in flags.items())]
    command += [f"--out={tmp_path / 'out'}", "--images_per_prompt=2", "--batch_size=2", "--cpu"]
    port = free_port()
    both = [start(command, rank, port) for rank in (0, 1)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert ["all subjects" in out for out, _ in outputs] == [True, False]
    shares = [len(p.read_text().splitlines()) for p in sorted((tmp_path / "out").glob("*.jsonl"))]
    assert shares == [5, 5]
    joined, alone = table(tmp_path / "out"), table(judged)
    assert joined.keys() == alone.keys()
    for name, row in joined.items():
        for column in COLUMNS:
            assert float(row[column] or -9) == pytest.approx(
                float(alone[name][column] or -9), abs=1e-5
            )


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def start(command, rank, port):
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=env, text=True, **pipes)


# --- generate


@pytest.fixture(scope="module")
def model(files):
    """A tiny Stable Diffusion with adapters."""
    pipe = wrap(tiny_pipeline(files))
    pipe.pipeline.save_pretrained(files / "sd")
    save_adapters(random_adapters(pipe.layout), files / "sd.safetensors")
    return {"model": files / "sd", "adapters": files / "sd.safetensors", "steps": 2, "size": 64}


@pytest.fixture(scope="module")
def made(files, model):
    """Images made and judged."""
    evaluate(files, files / "made", "--generate", images=None, **model)
    return files / "made"


def test_generated_images_lie_where_the_judge_finds_them(files, made):
    images = {path.relative_to(made).as_posix() for path in made.rglob("*.png")}
    assert images == {
        *("mug/00_0.png", "mug/00_1.png", "mug/01_0.png", "mug/01_1.png"),
        *("rex/00_0.png", "rex/00_1.png"),
    }
    assert images <= set(table(made))
    contents = {(made / name).read_bytes() for name in images}
    assert len(contents) == 6


def test_the_prompt_and_the_reference_are_in_an_images_metadata(made):
    with Image.open(made / "rex" / "00_1.png") as image:
        facts = json.loads(image.text["dreamcache"])
    assert image.size == (64, 64)
    assert (facts["prompt"], facts["reference"]) == ("a dog in a hat", ["00.png"])
    assert facts["steps"] == 2


def test_images_that_are_there_stay_and_the_missing_one_comes_out_the_same(
    files, model, made, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    before = (out / "mug" / "01_0.png").read_bytes()
    (out / "mug" / "01_0.png").unlink()
    kept = (out / "rex" / "00_0.png").stat().st_mtime_ns
    evaluate(files, out, "--generate", "--subjects", "mug", images=None, **model)
    assert (out / "mug" / "01_0.png").read_bytes() == before
    assert (out / "rex" / "00_0.png").stat().st_mtime_ns == kept
    assert list(table(out, "subjects")) == ["mug"]


def test_images_of_other_settings_are_not_mixed_in(files, model, made):
    with pytest.raises(InputError, match="made with another cfg"):
        evaluate(files, made, "--generate", images=None, cfg=3, **model)


# --- what is refused


def test_a_judge_of_another_kind_missing_or_incomplete_is_refused(files, tmp_path):
    with pytest.raises(InputError, match="--clip to be a local model folder"):
        evaluate(files, tmp_path / "out", clip=tmp_path / "none")
    with pytest.raises(UnsupportedModelError, match="holds a clip model"):
        evaluate(files, tmp_path / "out", dino=files / "clip")
    broken = tmp_path / "broken"
    shutil.copytree(files / "clip", broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(FileFormatError, match="could not be loaded as a CLIPModel"):
        ClipEncoder(broken, CPU)
    deeper = tmp_path / "deeper"
    shutil.copytree(files / "dino", deeper)
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(FileFormatError, match="16 are missing"):
        DinoEncoder(deeper, CPU)


def test_a_prompt_longer_than_clips_limit_is_cut(files):
    encoder = ClipEncoder(files / "clip", CPU)
    short, long = encoder.texts(["a b c", "a b c " * 20])
    assert torch.isfinite(long).all()
    assert float(short @ long) < 0.999


def test_thin_image_is_cut_before_it_is_enlarged(files):
    """60,000 x 8 pixels would take gigabytes for a middle square of 32 x 32."""
    encoder = ClipEncoder(files / "clip", CPU)
    thin = Image.effect_noise((60_000, 8), 60).convert("RGB")
    start = time.process_time()
    whole = encoder.images([thin, thin.rotate(90, expand=True)])
    assert time.process_time() - start < 2
    middle = thin.crop((29_900, 0, 30_100, 8))
    assert torch.allclose(whole[0], encoder.images([middle])[0], atol=1e-4)
