"""The folder of a run: what it is a run of, checkpoints that appear whole or not at all, the log."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import InputError, StateError
from ..files.jsonl import append_lines, read_lines
from ..files.whole_files import whole_file

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"step-(\d+)")
_STATE_FILE = "run.json"
_UNFINISHED = ".unfinished"


class RunFolder:
    """Files of one run.

    Args:
        path: The folder; made when the run begins.
        keep_checkpoints: Newest checkpoints that are kept.
    """

    def __init__(self, path: str | Path, keep_checkpoints: int) -> None:
        self.path, self.keep_checkpoints = Path(path), keep_checkpoints

    @property
    def adapters_file(self) -> Path:
        """The finished adapters."""
        return self.path / "adapters.safetensors"

    @property
    def log_file(self) -> Path:
        """One JSON object a line."""
        return self.path / "log.jsonl"

    @property
    def validation_folder(self) -> Path:
        """Validation grids."""
        return self.path / "validation"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Step and folder of all complete checkpoints, oldest first."""
        folder = self.path / "checkpoints"
        found = folder.iterdir() if folder.is_dir() else ()
        matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in found)
        return sorted((int(match[1]), path) for match, path in matches if match)

    def newest_checkpoint(self, before: float = math.inf) -> tuple[int, Path] | None:
        """Step and folder of the newest complete checkpoint, of an earlier step than ``before``."""
        found = [(step, path) for step, path in self.checkpoints() if step < before]
        return found[-1] if found else None

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes that the checkpoints take now, those of a run that was cut off included."""
        files = (self.path / "checkpoints").rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    def begin(self, identity: Mapping[str, Any], *, resume: bool) -> tuple[int, Path] | None:
        """Check the folder against what the run is about to do; change nothing yet.

        Args:
            identity: What makes the run the run it is: model, data, settings.
            resume: Whether it goes on from the newest checkpoint.

        Returns:
            Step and folder of the checkpoint to go on from; ``None``: begin anew.

        Raises:
            InputError: The checkpoints are of another run; the message lists what differs.
            StateError: There are checkpoints, or finished adapters, but nobody asked to resume.
        """
        newest = self.newest_checkpoint()
        if not resume:
            if newest is not None or self.adapters_file.exists():
                raise StateError(
                    f"{self.path} holds a run already. Add --resume to go on with it, or give another --out."
                )
            return None
        if newest is None:
            logger.warning("%s holds no checkpoint: the run begins at step 0.", self.path)
            return None
        self._require_same(identity)
        return newest

    def _require_same(self, identity: Mapping[str, Any]) -> None:
        try:
            before = json.loads((self.path / _STATE_FILE).read_text(encoding="utf-8"))["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path / _STATE_FILE} is missing or damaged ({error}), so nothing tells what the checkpoints "
                "are of. Give another --out."
            ) from error
        differing = [
            f"{name} was {before.get(name)!r}, is {value!r}"
            for name, value in json.loads(json.dumps(identity)).items()
            if before.get(name) != value
        ]
        if differing:
            raise InputError(
                f"The run in {self.path} cannot be resumed with other settings: {'; '.join(differing)}. Set them back, "
                "or start a run of its own with another --out (--adapters takes over what this one has learnt)."
            )

    def write_state(self, identity: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Record what the run is, before its first step."""
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"identity": identity, "settings": settings}, indent=2)
        with whole_file(self.path / _STATE_FILE) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @contextmanager
    def new_checkpoint(self, step: int, *, is_main: bool, wait: Any) -> Iterator[Path]:
        """Write a checkpoint into a folder that gets its name only when it is complete.

        All processes enter; the main one names the folder and removes the oldest ones.

        Args:
            step: Steps done.
            is_main: Whether this is the main process.
            wait: Called to wait for the other processes.

        Yields:
            The folder to write to.
        """
        target = self.path / "checkpoints" / f"step-{step:06d}"
        unfinished = target.with_suffix(_UNFINISHED)
        if is_main:
            self._remove_unfinished()
            unfinished.mkdir(parents=True)
        wait()
        try:
            yield unfinished
        except (OSError, RuntimeError, SafetensorError, InputError) as error:
            newest = self.newest_checkpoint()
            raise InputError(
                f"The checkpoint of step {step} could not be written: {error}. "
                f"{f'The last good one is {newest[1]}' if newest else 'There is none before it'}. Make room and "
                "go on with --resume."
            ) from error
        wait()
        if is_main:
            if target.exists():
                shutil.rmtree(target)
            unfinished.rename(target)
            for _, old in self.checkpoints()[: -self.keep_checkpoints]:
                shutil.rmtree(old)
        wait()

    def _remove_unfinished(self) -> None:
        for left in (self.path / "checkpoints").glob(f"*{_UNFINISHED}"):
            shutil.rmtree(left)

    def cut_log(self, step: int) -> None:
        """Drop the log's entries after a step: they are about to be written again."""
        if not self.log_file.exists():
            return
        kept = [e for e in read_lines(self.log_file) if e.get("step", math.inf) <= step]
        with whole_file(self.log_file) as temporary:
            append_lines(temporary, kept)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append an entry to the log."""
        try:
            append_lines(self.log_file, [entry])
        except OSError as error:
            logger.warning("The log cannot be written: %s.", error)
