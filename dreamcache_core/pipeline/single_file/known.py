"""Configurations of the families that a checkpoint's own tensors tell apart, and CLIP's tokenizer, which all of them use."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files.tensor_file import read_header

HERE = Path(__file__).parent
CONTEXT_KEY = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
OTHER_PREDICTION_KEYS = ("v_pred", "edm_mean", "edm_vpred.sigma_max")
"""Tensors by which checkpoints of SDXL say that they predict something else than noise."""

BY_CONTEXT_WIDTH = {768: "sd1", 2048: "sdxl"}
UNDECIDED_WIDTH = 1024
"""Of Stable Diffusion 2.x, whose files do not tell whether they predict noise or v."""

BYTES_THAT_STAND_FOR_THEMSELVES = (*range(33, 127), *range(161, 173), *range(174, 256))


def known_config(path: Path) -> Path:
    """Find the configurations of a single-file checkpoint.

    Args:
        path: The file.

    Returns:
        A folder like that of a diffusers pipeline, but for weights and tokenizers.

    Raises:
        FileFormatError: The file is damaged or holds something else than tensors by key.
        InputError: It is of no family that a file's tensors tell apart.
    """
    tensors = read_header(path).tensors if path.suffix.lower() == ".safetensors" else {}
    context = tensors.get(CONTEXT_KEY)
    width = 0 if context is None else context.shape[-1]
    predicts_other = any(key in tensors for key in OTHER_PREDICTION_KEYS)
    if width in BY_CONTEXT_WIDTH and not predicts_other:
        return HERE / BY_CONTEXT_WIDTH[width]
    cause = (
        "configurations come along for .safetensors files of Stable Diffusion 1.x and SDXL alone"
    )
    if width == UNDECIDED_WIDTH:
        cause = "of Stable Diffusion 2.x a file does not tell whether it predicts noise or v"
    elif predicts_other:
        cause = "it does not predict noise, and has noise levels of its own"
    raise InputError(
        f"{path} is a single-file checkpoint; {cause}. Give --config (with train --model_config), a local diffusers folder of "
        "the same family. Nothing is downloaded."
    )


def missing_tokenizers(folder: Path, *, is_sdxl: bool) -> dict[str, Any]:
    """Make the tokenizers that a folder of configurations lacks, as options of diffusers' loader."""
    if (folder / "tokenizer").is_dir():
        return {}
    first = clip_tokenizer(pad="<|endoftext|>")
    return {"tokenizer": first, **({"tokenizer_2": clip_tokenizer(pad="!")} if is_sdxl else {})}


def clip_tokenizer(*, pad: str) -> Any:
    """Make CLIP's tokenizer, byte-pair encoding with its 48,894 merges, of a length of 77.

    Args:
        pad: Token that fills short texts up.
    """
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    lines = (HERE / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    symbols = _byte_symbols()
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    words += ["".join(line.split()) for line in lines]
    vocabulary = {word: number for number, word in enumerate([*words, start, end])}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        shutil.copy(HERE / "merges.txt", place)
        return CLIPTokenizer.from_pretrained(
            folder,
            model_max_length=77,
            bos_token=start,
            eos_token=end,
            unk_token=end,
            pad_token=pad,
            local_files_only=True,
        )


def _byte_symbols() -> list[str]:
    """The character that stands for each byte: printable ones for themselves, the others follow from 256 on."""
    others = [byte for byte in range(256) if byte not in BYTES_THAT_STAND_FOR_THEMSELVES]
    return [*map(chr, BYTES_THAT_STAND_FOR_THEMSELVES), *(chr(256 + n) for n in range(len(others)))]
