"""The command line: ``dreamcache generate | inspect | convert``. The one module of the core that prints."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from . import __version__, cache, checkpoints
from .adapter import AdapterSet
from .backends import layout_of
from .cache import ReferenceCache
from .checkpoints import load_adapters, save_adapters
from .config import Config
from .errors import DreamCacheError, FileFormatError, InputError
from .guidance import Guidance, GuidanceMode
from .image_files import contact_sheet, read_image, read_mask, save_png
from .injection import ReferenceUse
from .layers import require_same_layout
from .reference_image import check_mask_aspect, prepare_reference_image
from .tensor_file import FORMAT_KEY, is_torch_file, kind_of_weights, refuse_non_weights

if TYPE_CHECKING:
    from .pipeline import DreamCachePipeline

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
METADATA_KEY = "dreamcache"
"""Key of the PNG text chunk that holds all parameters as JSON."""

SHEET_COLUMNS = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; ``None`` takes those of the process.

    Returns:
        Exit code: 0 done, 2 bad input (one line on stderr says what), 130 interrupted.
    """
    args = _parser().parse_args(argv)
    with _log_on_stderr():
        try:
            args.run(args)
        except (DreamCacheError, OSError) as error:
            return _fail(str(error))
        except torch.cuda.OutOfMemoryError:
            return _fail("The device ran out of memory. Use --dtype float16 or a smaller --size.")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
    return 0


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


class _StderrHandler(logging.Handler):
    """Shows each message of the package once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        kind = "warning" if record.levelno >= logging.WARNING else "note"
        line = f"{kind}: {record.getMessage()}"
        if line not in self.seen:
            self.seen.add(line)
            print(line, file=sys.stderr)


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    logger, handler = logging.getLogger(__package__), _StderrHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dreamcache", description="Personalised images from one picture of a subject."
    )
    parser.add_argument("--version", action="version", version=f"dreamcache {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_generate, _add_inspect, _add_convert):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[[Any], None], help: str) -> Any:
    parser = commands.add_parser(
        name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


# --- generate


@dataclass(frozen=True)
class GenerateOptions(Config):
    """What ``dreamcache generate`` was asked for; the parser explains the fields."""

    model: str
    adapters: str
    reference: Sequence[str]
    prompt: str
    out: str
    config: str | None = None
    mask: Sequence[str] = ()
    negative: str = ""
    image_guidance: float = 0.4
    cfg: float = 7.5
    steps: int = 50
    seed: int = 0
    count: int = 1
    size: int | None = None
    fill: float = 0.85
    guidance: GuidanceMode = "separate"
    scale: float = 1.0
    scheduler: str = "ddim"
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            InputError: A number is out of range, or masks and references differ in number.
        """
        Guidance(self.image_guidance, self.guidance)
        if not math.isfinite(self.cfg) or not math.isfinite(self.scale):
            raise InputError(
                f"--cfg and --scale must be finite; given {self.cfg} and {self.scale}."
            )
        if self.steps < 1 or self.count < 1:
            raise InputError(
                f"--steps and --count must be at least 1; given {self.steps} and {self.count}."
            )
        if not 0 <= self.seed <= 2**64 - self.count:
            raise InputError(
                f"--seed must be in 0 ... 2^64 - 1, also for the last image; given {self.seed}."
            )
        if self.mask and len(self.mask) != len(self.reference):
            raise InputError(
                f"Give --mask once for every --reference, in the same order, or not at all; given {len(self.mask)} "
                f"masks and {len(self.reference)} references."
            )

    def parameters(self, size: int, versions: Mapping[str, str]) -> dict[str, Any]:
        """Return what an image's text chunk tells: files by name only, so that no folder is given away."""
        values = {**self.to_dict(), "size": size, "versions": dict(versions)}
        for key in ("model", "adapters", "config"):
            values[key] = values[key] and Path(values[key]).resolve().name
        for key in ("reference", "mask"):
            values[key] = [Path(name).name for name in values[key]]
        del values["out"], values["count"]
        return values


def _add_generate(commands: Any) -> None:
    parser = _command(commands, "generate", _generate, "Generate images of a subject.")
    add = parser.add_argument
    add("--model", required=True, help="diffusers folder or single-file checkpoint, local")
    add("--config", help="for a single file: a local diffusers folder of the same family")
    add("--adapters", required=True, help="adapter file (.safetensors or released .pt)")
    add(
        "--reference",
        required=True,
        action="append",
        help="picture of the subject; give it again for further pictures of the same subject",
    )
    add(
        "--mask",
        action="append",
        default=[],
        help="mask of the picture, white = subject; without it, the picture's alpha channel",
    )
    add("--prompt", required=True, help="what to show")
    add("--negative", default="", help="what to avoid")
    add("--out", required=True, help="folder for the images")
    add("--image-guidance", type=float, default=0.4, help="pull of the reference")
    add("--cfg", type=float, default=7.5, help="pull of the prompt; 1 = off")
    add("--steps", type=int, default=50, help="sampling steps")
    add("--seed", type=int, default=0, help="seed of the first image; the next adds 1")
    add("--count", type=int, default=1, help="number of images")
    add("--size", type=int, help="side in pixels of reference and images; else the model's")
    add("--fill", type=float, default=0.85, help="share of the side the subject takes")
    add("--scale", type=float, default=1.0, help="strength of the adapters; 0 = plain model")
    add("--guidance", choices=("separate", "joint"), default="separate", help="see the manual")
    add("--scheduler", choices=("ddim", "model"), default="ddim", help="ddim: as in the paper")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="float type of the model")


def _generate(args: argparse.Namespace) -> None:
    options = GenerateOptions.from_dict({k: v for k, v in vars(args).items() if k != "run"})
    out = _check_out(Path(options.out))
    pictures = _read_references(options)
    adapters = load_adapters(options.adapters)
    pipeline = _load_pipeline(options, adapters)
    size = options.size or min(pipeline.default_size_px)
    prepared = torch.cat(
        [
            prepare_reference_image(image, mask, size=size, fill=options.fill)[0]
            for image, mask in pictures
        ]
    )
    use = ReferenceUse(pipeline.encode_reference(prepared), adapters, options.scale)
    run = _Run(out, options.parameters(size, _versions()), list(prepared.split(1)))
    with tqdm(total=options.count * options.steps, unit="step", desc="sampling") as bar:
        for seed in range(options.seed, options.seed + options.count):
            image = _sample(pipeline, use, options, seed, size, bar)
            run.add_image(image, seed)
    run.finish()


def _check_out(out: Path) -> Path:
    """Refuse a target folder that could not be made or written to; make nothing yet."""
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(
            f"Cannot write to {out}: {nearest} is {'not writable' if nearest.is_dir() else 'a file'}. Give --out a "
            "folder of your own."
        )
    return out


def _read_references(options: GenerateOptions) -> list[tuple[Tensor, Tensor | None]]:
    """Read pictures (1, height, width, 3) and masks; the alpha channel is the mask where none is given."""
    pictures: list[tuple[Tensor, Tensor | None]] = []
    bare: list[str] = []
    for index, path in enumerate(options.reference):
        image, alpha = read_image(path)
        mask = read_mask(options.mask[index]) if options.mask else alpha
        if mask is None:
            bare.append(Path(path).name)
        else:
            check_mask_aspect(mask, *image.shape[1:3])
        pictures.append((image, mask))
    if bare:
        print(
            f"warning: {', '.join(bare)}: no mask and no transparency, so the background will leak into the images. "
            "Give --mask, or a PNG whose background is transparent.",
            file=sys.stderr,
        )
    return pictures


def _load_pipeline(options: GenerateOptions, adapters: AdapterSet) -> DreamCachePipeline:
    from .pipeline import DreamCachePipeline, load_diffusers_pipeline, require_diffusers

    device = _device(options.device)
    dtype = DTYPES.get(options.dtype)
    if dtype is None:
        dtype = torch.float16 if device.type in ("cuda", "xpu") else torch.float32
    model = load_diffusers_pipeline(options.model, config=options.config, dtype=dtype)
    layout = adapters.info.layout
    require_same_layout(layout_of(model.unet, layout.layers), "The model", layout, "the adapters")
    if options.scheduler == "ddim":  # METHOD.md section 5: DDIM, eta 0
        model.scheduler = require_diffusers().DDIMScheduler.from_config(
            model.scheduler.config,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="leading",
        )
    return DreamCachePipeline(model.to(device))


def _device(name: str) -> torch.device:
    if name == "auto":
        for kind in ("cuda", "xpu", "mps"):
            backend = getattr(torch, kind, None)
            if backend is not None and backend.is_available():
                return torch.device(kind)
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used: {reason}. Try --device auto.") from error
    return device


def _sample(
    pipeline: DreamCachePipeline,
    use: ReferenceUse,
    options: GenerateOptions,
    seed: int,
    size: int,
    bar: Any,
) -> Tensor:
    """Generate one image (1, height, width, 3) in [0, 1]."""
    done = 0

    def advance(step: int, timestep: int, latents: Tensor) -> None:  # noqa: ARG001
        nonlocal done
        share = (step + 1) / len(pipeline.pipeline.scheduler.timesteps)
        bar.update(round(share * options.steps) - done)
        done = round(share * options.steps)

    image = pipeline(
        options.prompt,
        use,
        negative_prompt=options.negative,
        text_scale=options.cfg,
        image_scale=options.image_guidance,
        num_inference_steps=options.steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        guidance=options.guidance,
        height=size,
        width=size,
        callback=advance,
        output_type="pt",
    )
    return image.permute(0, 2, 3, 1).float().cpu()


def _versions() -> dict[str, str]:
    from .pipeline import require_diffusers

    diffusers = require_diffusers()
    return {
        "dreamcache": __version__,
        "torch": str(torch.__version__),
        "diffusers": str(diffusers.__version__),
    }


class _Run:
    """The files of one run: ``0001_reference.png``, ``0001_seed_7.png``, ..., ``0001_sheet.png``.

    The number is the first free one of the folder, so nothing is overwritten. The folder appears with the first image.
    """

    def __init__(
        self, folder: Path, parameters: Mapping[str, Any], references: list[Tensor]
    ) -> None:
        self.folder, self.parameters, self.references = folder, parameters, references
        self.number = _first_free_number(folder)
        self.images: list[tuple[Tensor, int]] = []

    def add_image(self, image: Tensor, seed: int) -> None:
        if not self.images:
            self.folder.mkdir(parents=True, exist_ok=True)
            for index, picture in enumerate(self.references, start=1):
                suffix = "" if len(self.references) == 1 else f"_{index}"
                self.write(f"reference{suffix}", picture, {})
        self.images.append((image, seed))
        self.write(f"seed_{seed}", image, {**self.parameters, "seed": seed})

    def finish(self) -> None:
        rows: list[list[Tensor]] = [self.references]
        captions = [["reference"] * len(self.references)]
        for start in range(0, len(self.images), SHEET_COLUMNS):
            chunk = self.images[start : start + SHEET_COLUMNS]
            rows.append([image for image, _ in chunk])
            captions.append([f"seed {seed}" for _, seed in chunk])
        self.write("sheet", contact_sheet(rows, captions), self.parameters)

    def write(self, name: str, image: Tensor, parameters: Mapping[str, Any]) -> None:
        path = self.folder / f"{self.number:04d}_{name}.png"
        save_png(path, image, {METADATA_KEY: json.dumps(parameters)} if parameters else None)
        tqdm.write(str(path))


def _first_free_number(folder: Path) -> int:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    taken = [int(name.split("_")[0]) for name in names if name.split("_")[0].isdecimal()]
    return max(taken, default=0) + 1


# --- inspect


def _add_inspect(commands: Any) -> None:
    parser = _command(commands, "inspect", _inspect, "Say what an adapter or reference file is.")
    parser.add_argument("file", metavar="FILE", help="any file of weights")


def _inspect(args: argparse.Namespace) -> None:
    for name, value in _describe(Path(args.file)).items():
        print(f"{name + ':':<12} {value}")


def _describe(path: Path) -> dict[str, str]:
    dtypes, metadata = _read_header(path)
    kind, found = kind_of_weights(set(dtypes)), metadata.get(FORMAT_KEY)
    if found == cache.FORMAT:
        return {"file": str(path), **_describe_reference(ReferenceCache.load(path))}
    is_released = found is None and kind.startswith("DreamCache adapters")
    if found == checkpoints.FORMAT or is_released:
        text = _describe_adapters(load_adapters(path), is_released)
        return {"file": str(path), **text, "dtype": ", ".join(sorted(set(dtypes.values())))}
    what = kind if found is None else f"a DreamCache file of unknown format {found}"
    return {
        "file": str(path),
        "kind": f"{what}: neither DreamCache adapters nor a saved reference",
        "tensors": str(len(dtypes)),
    }


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Read the float type of each tensor and the metadata; of a safetensors file without the values."""
    if is_torch_file(refuse_non_weights(path)):
        tensors, metadata = checkpoints._read_any(path)
        return {key: str(t.dtype).removeprefix("torch.") for key, t in tensors.items()}, metadata
    try:
        with safe_open(path, framework="pt", device="cpu") as file:  # pyright: ignore[reportUnknownVariableType]
            keys: list[str] = list(file.keys())
            return {key: _dtype_name(file.get_slice(key)) for key in keys}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(
            f"{path} is not a complete safetensors file ({error}). Copy or download it again."
        ) from error


def _dtype_name(tensor: Any) -> str:
    name = str(tensor.get_dtype())
    return {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}.get(
        name, name
    )


def _describe_adapters(adapters: AdapterSet, is_released: bool) -> dict[str, str]:
    info = adapters.info
    family = f"{info.layout.family} (text width {info.layout.context_width})"
    if is_released:
        family += ", assumed: a released file carries none"
    return {
        "kind": "DreamCache adapters, " + ("as released" if is_released else "own format"),
        "family": family,
        "layers": ", ".join(f"{name} ({width})" for name, width in info.layout.channels.items()),
        "parameters": f"{adapters.num_parameters:,}",
        "timestep": str(info.timestep),
        "prediction": info.prediction,
        "base model": info.base_model or "not stated",
        **info.extra,
    }


def _describe_reference(reference: ReferenceCache) -> dict[str, str]:
    height, width = reference.latent_size
    features = reference.features.items()
    return {
        "kind": "saved DreamCache reference",
        "family": f"{reference.family} (text width {reference.context_width})",
        "layers": ", ".join(f"{name} {tuple(f.shape[1:])}" for name, f in features),
        "pictures": str(reference.num_references),
        "latent": f"{height} x {width} (height x width)",
        "timestep": str(reference.timestep),
        "seed": "not stated" if reference.seed is None else str(reference.seed),
        "mask": "none" if reference.masks is None else "subject tokens only",
        "dtype": str(next(iter(reference.features.values())).dtype).removeprefix("torch."),
        "size": f"{reference.nbytes / 2**20:.1f} MiB",
    }


# --- convert


def _add_convert(commands: Any) -> None:
    parser = _command(commands, "convert", _convert, "Turn released adapters into our format.")
    parser.add_argument("source", metavar="IN", help="adapter file (released .pt, or our format)")
    parser.add_argument("target", metavar="OUT", help="the .safetensors file to write")
    parser.add_argument("--family", help="of a released file: sd15, sd21 (assumed), custom-<width>")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="else that of IN")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def _convert(args: argparse.Namespace) -> None:
    source, target = Path(args.source), Path(args.target)
    if target.suffix != ".safetensors":
        raise InputError(f"OUT must end in .safetensors; given {target}.")
    if target.exists() and not args.force:
        raise InputError(f"{target} exists. Give another name, or --force to replace it.")
    if not target.parent.is_dir():
        raise InputError(f"There is no folder {target.parent}. Create it, or give another one.")
    dtypes, metadata = _read_header(source)
    adapters = load_adapters(source, family=args.family)
    if FORMAT_KEY in metadata and args.family not in (None, adapters.family):
        raise InputError(
            f"{source} is in our format and says that its family is {adapters.family}; --family {args.family} is for "
            "released files, which carry none."
        )
    dtype = DTYPES[args.dtype or _common_dtype(dtypes)]
    _refuse_overflow(adapters, dtype)
    save_adapters(adapters, target, dtype=dtype)
    print(target)


def _common_dtype(dtypes: Mapping[str, str]) -> str:
    names = set(dtypes.values())
    return names.pop() if len(names) == 1 and names <= set(DTYPES) else "float32"


def _refuse_overflow(adapters: AdapterSet, dtype: torch.dtype) -> None:
    if not all(bool(p.to(dtype).isfinite().all()) for p in adapters.parameters()):
        raise InputError(f"A weight is too large for {dtype}. Use --dtype bfloat16 or float32.")
