"""Checkpoints that appear whole or not at all, and what they are checkpoints of."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from ..config import differences
from ..errors import FileFormatError, InputError, StateError
from ..files.jsonl import append_lines, read_lines
from ..files.texts import read_json
from ..files.whole_files import digest_of, flush, whole_file
from ..names import is_plain_name, printable

logger = logging.getLogger(__name__)

ADAPTERS_FILE = "adapters.safetensors"
"""Of a run or of one of its checkpoints."""

_NAME = re.compile(r"step-(\d+)")
_STATE_FILE = "run.json"
FOR_ONE_START = ("resume", "accept_changed_data", "dry_run")
"""Settings that say how a run is started, not what it is."""

SETTINGS_FILE = "run.toml"
"""What the run was told, as ``--config`` takes it."""
_UNFINISHED = ".unfinished"
_CONTENTS_FILE = "contents.json"
"""Of a checkpoint: the digest of each of its files."""


class Checkpoint(NamedTuple):
    """A complete checkpoint: the steps before it, and its folder."""

    step: int
    path: Path


class Checkpoints:
    """The checkpoints in the folder of a run.

    Args:
        run_folder: The folder; made when the run begins.
        keep: How many of the newest are kept.
    """

    def __init__(self, run_folder: Path, keep: int) -> None:
        self.run_folder, self.keep = run_folder, keep
        self.folder = run_folder / "checkpoints"

    def complete(self) -> list[Checkpoint]:
        """List the complete ones, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        matches = ((_NAME.fullmatch(path.name), path) for path in found)
        return sorted(Checkpoint(int(match[1]), path) for match, path in matches if match)

    def newest(self, before: float = math.inf) -> Checkpoint | None:
        """Find the newest complete one of a step earlier than ``before``."""
        return next((c for c in reversed(self.complete()) if c.step < before), None)

    @property
    def num_bytes(self) -> int:
        """What they take now, one that was cut off included."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def require_free(self) -> None:
        """Refuse a folder that holds a run.

        Raises:
            StateError: There are checkpoints, or finished adapters.
        """
        if self.newest() is not None or (self.run_folder / ADAPTERS_FILE).exists():
            raise StateError(
                f"{self.run_folder} holds a run already. Add --resume to go on with it, or give another --out."
            )

    def choose_start(self, identity: Mapping[str, Any]) -> Checkpoint | None:
        """Check the folder against the run that is about to go on in it; change nothing yet.

        Args:
            identity: What makes the run the run it is: model, data, settings.

        Returns:
            The newest checkpoint; ``None`` where there is none.

        Raises:
            InputError: The checkpoints are of another run (the message lists what differs), or the newest is damaged.
        """
        newest = self.newest()
        if newest is None:
            logger.warning("%s holds no checkpoint: the run begins at step 0.", self.run_folder)
            return None
        changes = differences(self.read_identity(), json.loads(json.dumps(identity)))
        if changes:
            raise InputError(
                f"The run in {self.run_folder} cannot be resumed with other settings: {changes}. Set them back, "
                "or start a run of its own with another --out (--adapters takes over what this one has learnt)."
            )
        damage = _damage(newest.path)
        if damage:
            raise self.damaged(newest, damage)
        return newest

    def damaged(self, checkpoint: Checkpoint, damage: str) -> InputError:
        """Return the error for a checkpoint that cannot be gone on from, with the good one before it."""
        earlier = (each for each in reversed(self.complete()) if each.step < checkpoint.step)
        good = next((each for each in earlier if not _damage(each.path)), None)
        goes_on = "begins at step 0" if good is None else f"goes on from {good.path}"
        return InputError(
            f"The checkpoint {checkpoint.path} is damaged: {damage}. Remove that folder (and damaged ones before it): "
            f"--resume then {goes_on}."
        )

    def read_identity(self) -> dict[str, Any]:
        """Read what the checkpoints are of.

        Raises:
            InputError: Nothing tells.
        """
        file = self.run_folder / _STATE_FILE
        try:
            identity = read_json(file).get("identity")
            if not isinstance(identity, dict):
                raise FileFormatError("it holds no identity")
            return identity
        except FileFormatError as error:
            raise InputError(
                f"{file} is missing or damaged ({error}), so nothing tells what the checkpoints "
                "are of. Give another --out."
            ) from error

    def write_identity(self, identity: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Record what the run is, before its first step."""
        self.run_folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"identity": identity, "settings": settings}, indent=2)
        with whole_file(self.run_folder / _STATE_FILE) as temporary:
            temporary.write_text(text, encoding="utf-8")
        # what JSON writes of texts, numbers and lists is TOML as well
        lines = [
            f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
            for name, value in settings.items()
            if value is not None and name not in FOR_ONE_START
        ]
        with whole_file(self.run_folder / SETTINGS_FILE) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")

    @contextmanager
    def new(self, step: int, processes: Any) -> Iterator[Path]:
        """Write a checkpoint into a folder that gets its name only when it is complete.

        All processes enter; the main one names the folder and removes the oldest ones.

        Args:
            step: Steps done.
            processes: accelerate's ``Accelerator`` of this process.

        Yields:
            The folder to write to.
        """
        target = self.folder / f"step-{step:06d}"
        unfinished = target.with_suffix(_UNFINISHED)
        if processes.is_main_process:
            for left in self.folder.glob(f"*{_UNFINISHED}"):
                shutil.rmtree(left)
            unfinished.mkdir(parents=True)
        processes.wait_for_everyone()
        try:
            yield unfinished
        except (OSError, RuntimeError, SafetensorError, InputError) as error:
            newest = self.newest()
            raise InputError(
                f"The checkpoint of step {step} could not be written: {error}. "
                f"{f'The last good one is {newest.path}' if newest else 'There is none before it'}. Make room and "
                "go on with --resume."
            ) from error
        processes.wait_for_everyone()
        if processes.is_main_process:
            if target.exists():
                shutil.rmtree(target)
            _seal(unfinished)
            unfinished.rename(target)
            flush(self.folder)
            for old in self.complete()[: -self.keep]:
                shutil.rmtree(old.path)
        processes.wait_for_everyone()


def _seal(folder: Path) -> None:
    """Write down the digests of a checkpoint's files; all is on the disk when this returns."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    digests = {file.relative_to(folder).as_posix(): digest_of(file) for file in files}
    contents = folder / _CONTENTS_FILE
    contents.write_text(json.dumps(digests, indent=2), encoding="utf-8")
    for path in (*files, contents, folder):
        flush(path)


def _damage(folder: Path) -> str:
    """Say what of a checkpoint is not as it was written, if anything; of one from before there were digests nothing is known."""
    contents = folder / _CONTENTS_FILE
    if not contents.exists():
        return ""
    try:
        for name, digest in read_json(contents).items():
            if not (all(map(is_plain_name, name.split("/"))) and (folder / name).is_file()):
                return f"there is no file {printable(name)!r}"
            if digest_of(folder / name) != digest:
                return f"{name} has other contents than were written"
    except (FileFormatError, OSError) as error:
        return str(error)
    return ""


def _is_until(value: object, step: int) -> bool:
    return isinstance(value, int | float) and value <= step


def cut_log(file: Path, step: int) -> None:
    """Drop a log's entries after a step, which are about to be written again."""
    if file.exists():
        kept = [entry for entry in read_lines(file) if _is_until(entry.get("step"), step)]
        with whole_file(file) as temporary:
            append_lines(temporary, kept)
