"""DreamBench's lists and folders: what the protocol says, and what is refused."""

from pathlib import Path

import pytest
from PIL import Image

from dreamcache_core.errors import InputError
from dreamcache_core.evaluation.dreambench.dataset import (
    Subject,
    all_items,
    find_candidates,
    read_subjects,
)
from dreamcache_core.evaluation.dreambench.options import DreamBenchOptions
from dreamcache_core.evaluation.dreambench.prompts import DATASET_FILE, Benchmark, read_benchmark

OWN_FILE = """Classes

subject_name,class
red_mug,mug
dog2,dog
green-bear,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def benchmark_of(dataset: Path) -> Benchmark:
    (dataset / DATASET_FILE).write_text(OWN_FILE)
    return read_benchmark(dataset)


def subjects_of(dataset: Path, *names: str) -> list[Subject]:
    return read_subjects(dataset, benchmark_of(dataset), names)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for name in ("red_mug/01.jpg", "red_mug/00.png", "red_mug/00_mask.png", "dog2/a.jpg"):
        touch(tmp_path / "set" / name)
    touch(tmp_path / "set" / "green-bear" / "0.webp")
    return tmp_path / "set"


def test_the_protocol_has_21_objects_9_live_subjects_and_25_prompts_for_each() -> None:
    benchmark = read_benchmark()
    live = [entry for entry in benchmark.subjects if entry.is_live]
    assert len(benchmark.subjects) == len({entry.name for entry in benchmark.subjects}) == 30
    assert len(live) == 9
    assert {entry.class_word for entry in live} == {"cat", "dog"}
    assert len(set(benchmark.object_prompts)) == len(set(benchmark.live_prompts)) == 25
    assert len(set(benchmark.object_prompts) & set(benchmark.live_prompts)) == 15


def test_the_class_word_stands_in_every_prompt() -> None:
    benchmark = read_benchmark()
    bear = next(entry for entry in benchmark.subjects if entry.name == "bear_plushie")
    prompts = benchmark.prompts_of(bear)
    assert prompts[0] == "a stuffed animal in the jungle"
    assert prompts[24] == "a cube shaped stuffed animal"
    assert all("stuffed animal" in prompt and "{" not in prompt for prompt in prompts)


def test_the_datasets_own_file_takes_the_place_of_the_lists(tmp_path: Path) -> None:
    (tmp_path / DATASET_FILE).write_text(OWN_FILE)
    benchmark = read_benchmark(tmp_path)
    described = [(entry.name, entry.class_word, entry.is_live) for entry in benchmark.subjects]
    assert described == [
        ("red_mug", "mug", False),
        ("dog2", "dog", True),
        ("green-bear", "stuffed animal", False),
    ]
    assert benchmark.object_prompts == ("a {} in the snow", "a red {}")
    assert benchmark.live_prompts == ("a {} wearing a red hat",)


def test_files_of_the_user_override_both(tmp_path: Path) -> None:
    (tmp_path / DATASET_FILE).write_text(OWN_FILE)
    table, prompts = tmp_path / "subjects.csv", tmp_path / "prompts.txt"
    table.write_text("subject,class,kind,reference\nparrot,bird,live,02.jpg\n")
    prompts.write_text("the {} sings\n\n")
    benchmark = read_benchmark(tmp_path, subjects=table, live_prompts=prompts)
    (parrot,) = benchmark.subjects
    assert (parrot.is_live, parrot.reference) == (True, "02.jpg")
    assert benchmark.prompts_of(parrot) == ("the bird sings",)
    assert len(benchmark.object_prompts) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("subjects", "subject,class\nmug,mug\n", "kind"),
        ("subjects", "subject,class,kind\nmug,mug,alive\n", "alive"),
        ("subjects", "subject,class,kind\nmug,mug,object\nmug,cup,object\n", "mug"),
        ("subjects", "subject,class,kind\n", "at least one"),
        ("object_prompts", "a mug\n", "line 1 of"),
        ("live_prompts", "a {} and a {}\n", "line 1 of"),
        ("dataset", "Classes\n\nmug,mug\n", "as in the published dataset"),
    ],
)
def test_unfit_lists_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / (DATASET_FILE if name == "dataset" else "list")
    path.write_text(text)
    given = {name: tmp_path if name == "dataset" else path}
    with pytest.raises(InputError, match=message):
        read_benchmark(**given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "subject,class,kind,refrence\nmug,mug,object,1.png\n",
            "'refrence'. Did you mean 'reference'",
        ),
        ("subject,class,kind,notes\nmug,mug,object,\n", "'notes'. Those that are read: subject"),
        ("subject,class,kind,class\nmug,mug,object,cup\n", "every column once"),
        (
            "subject,class,kind\n\nmug,mug,object,1.png\n",
            "3 cells in line 3 of .* got 1.png as well",
        ),
        ("subject,class,kind\ncup,cup,object\nmug,mug,alive\n", "line 3 of"),
        ('subject,class,kind\nmug,"a\nb",object\n', r"class of mug in .* got 'a\\nb'"),
        ("subject,class,kind\nmug,\x1b[2J,object\n", "class of mug"),
        ("subject,class,kind\nmug,m\x00g,object\n", "class of mug|NUL"),
    ],
)
def test_what_a_list_of_subjects_says_is_read_or_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "subjects.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_benchmark(subjects=path)


def test_empty_cells_beyond_the_columns_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "subjects.csv"
    path.write_text("subject,class,kind\nmug,mug,object,,\n")
    assert read_benchmark(subjects=path).subjects[0].class_word == "mug"


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", "..", "a\\b", "C:", ".hidden", "a\x1b[2J"])
def test_subjects_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "subjects.csv"
    path.write_text(f"subject,class,kind\nmug,mug,object\n{name},mug,object\n")
    with pytest.raises(InputError, match="Expected the name of a folder for each subject"):
        read_benchmark(subjects=path)


def test_images_come_with_masks_and_the_first_is_the_reference(dataset: Path) -> None:
    mug, dog, bear = subjects_of(dataset)
    assert [photo.image.name for photo in mug.photos] == ["00.png", "01.jpg"]
    assert mug.photos[0].mask == dataset / "red_mug" / "00_mask.png"
    assert mug.photos[1].mask is None
    assert mug.reference == mug.photos[0]
    assert dog.prompts == ("a dog wearing a red hat",)
    assert bear.number == 2


@pytest.mark.parametrize("name", ["00_Mask.png", "00.mask.bmp", "00-MASK.tif"])
def test_masks_are_told_from_images_however_they_are_spelt(dataset: Path, name: str) -> None:
    mask = dataset / "red_mug" / "00_mask.png"
    renamed = mask.rename(mask.with_name(name))
    mug = subjects_of(dataset)[0]
    assert [photo.image.name for photo in mug.photos] == ["00.png", "01.jpg"]
    assert mug.photos[0].mask == renamed


def test_a_mask_of_no_image_is_named_and_no_image_itself(
    dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(dataset / "red_mug" / "02.mask.png")
    assert len(subjects_of(dataset)[0].photos) == 2
    assert "1 masks in" in caplog.text
    assert "belong to no image: 02.mask.png." in caplog.text


@pytest.mark.parametrize("double", ["00.JPG", "00.mask.png"])
def test_a_mask_is_that_of_one_image(dataset: Path, double: str) -> None:
    Image.new("RGB", (8, 8)).save(dataset / "red_mug" / double, format="PNG")
    with pytest.raises(InputError, match=r"called 00 in .*red_mug, got 00.*00.*00.*Rename"):
        subjects_of(dataset)


@pytest.mark.parametrize("ending", ["bmp", "tif", "GIF"])
def test_images_of_every_kind_that_is_read_count(dataset: Path, ending: str) -> None:
    touch(dataset / "dog2" / f"b.{ending}")
    assert [photo.image.name for photo in subjects_of(dataset)[1].photos] == [
        "a.jpg",
        f"b.{ending}",
    ]


def test_a_subject_keeps_its_number_when_others_are_left_out(dataset: Path) -> None:
    assert [subject.number for subject in subjects_of(dataset, "green-bear")] == [2]


def test_a_subject_without_images_is_left_out_with_a_warning(
    dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (dataset / "dog2" / "a.jpg").unlink()
    assert [subject.name for subject in subjects_of(dataset)] == ["red_mug", "green-bear"]
    assert "1 subjects have no images" in caplog.text
    with pytest.raises(InputError, match="none of dog2"):
        subjects_of(dataset, "dog2")


def test_unknown_names_and_empty_folders_are_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got mugg"):
        subjects_of(dataset, "mugg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="a folder with images for each subject"):
        subjects_of(tmp_path / "empty")


def test_a_reference_that_is_not_there_is_refused(dataset: Path) -> None:
    table = dataset / "subjects.csv"
    table.write_text("subject,class,kind,reference\nred_mug,mug,object,09.jpg\n")
    with pytest.raises(InputError, match=r"the reference 09\.jpg"):
        read_subjects(dataset, read_benchmark(dataset, subjects=table))
    table.write_text("subject,class,kind,reference\nred_mug,mug,object,01.jpg\n")
    (mug,) = read_subjects(dataset, read_benchmark(dataset, subjects=table))
    assert mug.reference.image.name == "01.jpg"


def test_the_protocol_asks_for_every_prompt_so_many_times(dataset: Path) -> None:
    items = all_items(subjects_of(dataset), 2)
    assert [item.name for item in items] == [
        *("red_mug/00_0.png", "red_mug/00_1.png", "red_mug/01_0.png", "red_mug/01_1.png"),
        *("dog2/00_0.png", "dog2/00_1.png"),
        *("green-bear/00_0.png", "green-bear/00_1.png", "green-bear/01_0.png"),
        "green-bear/01_1.png",
    ]
    assert items[3].prompt == "a red mug"


def test_images_are_found_by_their_numbers_with_real_images_for_comparison(
    dataset: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    for name in ("1_0.jpg", "00_1.png", "00_1_mask.png", "00_2.png", "sheet.png"):
        touch(images / "red_mug" / name)
    found = find_candidates(images, benchmark_of(dataset), subjects_of(dataset), 2)
    assert [(c.name, c.prompt) for c in found] == [
        ("red_mug/00_1.png", "a mug in the snow"),
        ("red_mug/1_0.jpg", "a red mug"),
        ("real/red_mug/00.png", None),
        ("real/red_mug/01.jpg", None),
    ]
    assert found[0].photo.mask == images / "red_mug" / "00_1_mask.png"


def test_images_whose_names_are_no_numbers_are_counted_and_three_named(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("00_0.png", "01_0 (1).png", "prompt1_0.png", "sheet.png", "z.bmp"):
        touch(tmp_path / "images" / "red_mug" / name)
    find_candidates(tmp_path / "images", benchmark_of(dataset), subjects_of(dataset), 4)
    assert "4 images in" in caplog.text
    names = ("01_0 (1)", "prompt1_0", "sheet")
    assert ": " + ", ".join(f"red_mug/{name}.png" for name in names) + " ..." in caplog.text


def test_generated_images_of_a_folder_that_is_no_subjects_are_named(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("red_mug", "dog2", "red-mug"):
        touch(tmp_path / "images" / folder / "00_0.png")
    benchmark = benchmark_of(dataset)
    mug = read_subjects(dataset, benchmark, ["red_mug"])
    found = find_candidates(tmp_path / "images", benchmark, mug, 4)
    assert [c.name for c in found if c.prompt_number is not None] == ["red_mug/00_0.png"]
    assert "1 folders of" in caplog.text
    assert "does not have them: red-mug." in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "there are none"),
        (("02_0.png",), r"prompts 0 \.\.\. 1"),
        (("1_0.png", "01_0.jpg"), "1_0"),
    ],
)
def test_missing_misnumbered_and_double_images_are_refused(
    dataset: Path, tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    for name in names:
        touch(tmp_path / "images" / "red_mug" / name)
    with pytest.raises(InputError, match=message):
        find_candidates(tmp_path / "images", benchmark_of(dataset), subjects_of(dataset), 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "got neither"),
        ({"images": "i", "generate": True}, "got both"),
        ({"generate": True}, "needs --model"),
        ({"images": "i", "batch_size": 0}, "batch_size to be at least 1"),
        ({"generate": True, "model": "m", "adapters": "a", "steps": 0}, "steps"),
        ({"generate": True, "model": "m", "adapters": "a", "size": 100}, "multiple of 8"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    changes: dict[str, object], message: str
) -> None:
    given = {"dataset": "d", "out": "o", "dino": "d", "clip": "c", **changes}
    with pytest.raises(InputError, match=message):
        DreamBenchOptions.from_dict(given)


def test_list_of_subjects_that_is_no_csv_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "subjects.csv"
    path.write_text(f"subject,class,kind\nmug,{'x' * 200_000},object\n")
    with pytest.raises(InputError, match=r"Expected CSV in .*field"):
        read_benchmark(subjects=path)
