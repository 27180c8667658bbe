"""Where the demo model's weights lie: a diffusers folder and the adapters beside it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import FileFormatError
from ..files.texts import read_json

Part = Literal["unet", "vae", "text_encoder"]

WEIGHTS: dict[Part, str] = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
PREVIEW_FILE = "vae/preview.json"
TOKENIZER_FILES = ("vocab.json", "merges.txt")


@dataclass(frozen=True)
class DemoFiles:
    """The demo model's files.

    Attributes:
        folder: Holds the diffusers folder ``model`` and ``adapters.safetensors``.
    """

    folder: Path

    @property
    def model(self) -> Path:
        """The diffusers folder."""
        return self.folder / "model"

    @property
    def adapters(self) -> Path:
        """The adapters of this model."""
        return self.folder / "adapters.safetensors"

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer, in the files that CLIP's came in."""
        return self.model / "tokenizer"

    def weights(self, part: Part) -> Path:
        """Weights of one part."""
        return self.model / part / WEIGHTS[part]

    def config(self, part: Part) -> dict[str, Any]:
        """Read the settings of one part."""
        return read_json(self.model / part / "config.json")

    def scheduler_config(self) -> dict[str, Any]:
        """Read the noise schedule's settings."""
        return read_json(self.model / SCHEDULER_CONFIG)

    def preview(self) -> dict[str, Any]:
        """Read the linear map from latents to colours: ``factors``, 4 rows of 3, and ``bias``."""
        return read_json(self.model / PREVIEW_FILE)

    def __iter__(self) -> Iterator[Path]:
        """Yield every file that the model needs."""
        for part in WEIGHTS:
            yield self.model / part / "config.json"
            yield self.weights(part)
        yield self.model / SCHEDULER_CONFIG
        yield self.model / PREVIEW_FILE
        yield from (self.tokenizer / name for name in TOKENIZER_FILES)
        yield self.adapters


def demo_folder() -> Path:
    """The folder that the demo model comes in."""
    return Path(__file__).parent


def require_demo_files(folder: Path | None = None) -> DemoFiles:
    """Find the demo model's files.

    Args:
        folder: Holds ``model`` and ``adapters.safetensors``; ``None`` takes what came with the package.

    Returns:
        The files; all of them exist.

    Raises:
        FileFormatError: Some are missing; the message lists them.
    """
    files = DemoFiles(folder or demo_folder())
    missing = [path.relative_to(files.folder).as_posix() for path in files if not path.is_file()]
    if missing:
        raise FileFormatError(
            f"The demo model is incomplete: {files.folder} lacks {', '.join(missing)}. These files come with DreamCache: "
            "download or clone it again, as a whole."
        )
    return files
