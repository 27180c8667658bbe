"""Where the demo model's files lie."""

from pathlib import Path

import pytest

from dreamcache_core import FileFormatError
from dreamcache_core.demo.files import DemoFiles, demo_folder, require_demo_files


def write_all(folder: Path) -> DemoFiles:
    files = DemoFiles(folder)
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"name": "' + path.parent.name + '"}')
    return files


def test_a_whole_folder_is_found_and_its_settings_are_read(tmp_path: Path) -> None:
    write_all(tmp_path)
    files = require_demo_files(tmp_path)
    assert files.config("vae") == {"name": "vae"}
    assert files.scheduler_config() == {"name": "scheduler"}
    assert files.weights("text_encoder") == tmp_path / "model/text_encoder/model.safetensors"
    assert files.adapters == tmp_path / "adapters.safetensors"


def test_what_is_missing_is_named_and_nothing_else(tmp_path: Path) -> None:
    files = write_all(tmp_path)
    files.weights("unet").unlink()
    (files.tokenizer / "merges.txt").unlink()
    missing = (
        r"lacks model/unet/diffusion_pytorch_model\.safetensors, model/tokenizer/merges\.txt\. "
    )
    with pytest.raises(FileFormatError, match=missing):
        require_demo_files(tmp_path)


def test_the_model_lies_beside_the_demo_world() -> None:
    assert (demo_folder() / "world" / "world.py").is_file()
