"""The folder of a synthetic set: what is finished in it, and writing so that a file is there whole or not at all.

::

    build.json                            what the set is built from; a restart must agree with it
    rejected-00000.jsonl                  one line per rejected sample, a file for each process
    a-red-toy-car/00000042_generation.png     form folder: the authors' layout
    a-red-toy-car/00000042_mask.png
    a-red-toy-car/00000042_caption.txt        written last: a sample with a caption is finished
    shard-000000.tar                      form shards: WebDataset shards of consecutive samples; until
    shard-000001/                         one is complete, its samples lie in a folder as above
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from ...config import differences
from ...errors import FileFormatError, InputError
from ...files.jsonl import append_lines, read_lines
from ...files.texts import read_json
from ...files.whole_files import whole_file
from ...images.files import encode_png
from ..packing import write_tar
from .captions import Caption

SETTINGS_FILE = "build.json"
MEMBERS = ("generation.png", "mask.png", "caption.txt")
"""Endings of a sample's files, the caption last; in shards they follow a dot, in folders an underscore."""


@dataclass(frozen=True)
class Sample:
    """One image to be made.

    Attributes:
        number: Its place in the set, from 0.
        caption: What it shows.
        seed: Of its noise.
    """

    number: int
    caption: Caption
    seed: int

    @property
    def stem(self) -> str:
        """Name of its files without their endings: ``a-red-toy-car/00000042``."""
        return f"{self.caption.slug}/{self.number:08d}"


class BuildFolder:
    """The folder as one process sees it; nothing is written before ``begin``.

    Args:
        root: The folder; need not exist.
        shard_size: Samples to a shard, rejected ones included; ``None``: no shards.
        process_index: Of this process, for the name of its log.
    """

    def __init__(self, root: Path, *, shard_size: int | None, process_index: int) -> None:
        self.root, self.shard_size = root, shard_size
        self._log = root / f"rejected-{process_index:05d}.jsonl"
        self._packed = {path.stem for path in root.glob("shard-*.tar")}
        self._rejected = set(read_rejections(root))

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a folder that holds something else, or a set built from other settings.

        Raises:
            InputError: It does; the message names the difference.
        """
        if not self.root.exists():
            return
        if not self.root.is_dir() or not os.access(self.root, os.W_OK | os.X_OK):
            raise InputError(
                f"Expected --out to be a folder that can be written to; {self.root} is none. Give another one."
            )
        file = self.root / SETTINGS_FILE
        if not file.exists():
            # hidden files: another process may just be writing the settings
            if any(not path.name.startswith(".") for path in self.root.iterdir()):
                raise InputError(
                    f"Expected --out to be empty, new or the folder of an interrupted build; {self.root} holds other "
                    f"files and no {SETTINGS_FILE}. Give another folder."
                )
            return
        try:
            changes = differences(read_json(file), settings)
        except FileFormatError as error:
            raise InputError(
                f"Expected {file} to say what the set is built from; it cannot be read: {error}. Give another --out."
            ) from error
        if changes:
            raise InputError(
                f"Expected the settings that {self.root} was begun with, got others ({changes}). Give the same ones to "
                "go on, or another --out."
            )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Create the folder and write down what the set is built from; every process may do so."""
        self.root.mkdir(parents=True, exist_ok=True)
        with whole_file(self.root / SETTINGS_FILE, by=self._log.stem) as temporary:
            temporary.write_bytes(json.dumps(dict(settings), indent=2).encode())

    def is_decided(self, sample: Sample) -> bool:
        """Tell whether a sample is finished or rejected."""
        return (
            sample.number in self._rejected
            or self._home(sample).name in self._packed
            or self._file(sample, MEMBERS[-1]).exists()
        )

    def save(self, sample: Sample, image: Tensor, mask: Tensor) -> None:
        """Write a sample's files, the caption last.

        Args:
            sample: The sample.
            image: (1, height, width, 3), float, in [0, 1].
            mask: (1, height, width), bool.

        Raises:
            OSError: The disk is full, or the folder went away; the sample is not finished then.
        """
        facts = json.dumps({"subject": sample.caption.subject, "seed": sample.seed})
        contents = (
            encode_png(image, {"dreamcache": facts}),
            encode_png(mask.float()),
            sample.caption.text.encode(),
        )
        self._file(sample, MEMBERS[0]).parent.mkdir(parents=True, exist_ok=True)
        for member, content in zip(MEMBERS, contents, strict=True):
            with whole_file(self._file(sample, member)) as temporary:
                temporary.write_bytes(content)

    def reject(self, sample: Sample, reason: str, value: float | None) -> None:
        """Write down that a sample is rejected, and why."""
        entry = {
            "number": sample.number,
            "reason": reason,
            "value": value,
            "subject": sample.caption.subject,
            "caption": sample.caption.text,
            "seed": sample.seed,
        }
        append_lines(self._log, [entry])
        self._rejected.add(sample.number)

    def pack(self, samples: Sequence[Sample]) -> None:
        """Move the decided samples of one shard into it, given all of them; none is written where all were rejected."""
        loose = self._home(samples[0])
        shard = loose.with_suffix(".tar")
        kept = [sample for sample in samples if sample.number not in self._rejected]
        if not shard.exists() and kept:
            write_tar(shard, map(self._members, kept))
        shutil.rmtree(loose, ignore_errors=True)

    def _members(self, sample: Sample) -> dict[str, Any]:
        contents = {member: self._file(sample, member).read_bytes() for member in MEMBERS}
        return {"__key__": sample.stem.replace("/", "-"), **contents}

    def _file(self, sample: Sample, member: str) -> Path:
        return self._home(sample) / f"{sample.stem}_{member}"

    def _home(self, sample: Sample) -> Path:
        """Where the folders of subjects are: the set itself, or the folder of a shard to be."""
        if self.shard_size is None:
            return self.root
        return self.root / f"shard-{sample.number // self.shard_size:06d}"


def read_rejections(root: Path) -> dict[int, str]:
    """Read which samples of a build were rejected, by all processes: number to reason."""
    # a line that an interruption cut short is left out: its sample is made again
    entries = chain.from_iterable(map(read_lines, sorted(root.glob("rejected-*.jsonl"))))
    return {
        entry["number"]: str(entry.get("reason"))
        for entry in entries
        if isinstance(entry.get("number"), int)
    }
