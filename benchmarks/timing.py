"""Clocks: several actions timed in turn, and the parts of one action. Knows nothing of models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

QUIET = 0.05
"""How far the same action may differ from itself on a machine that counts as idle."""


@dataclass(frozen=True)
class Spread:
    """A median with the smallest and largest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise values, at least one."""
        return cls(statistics.median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} - {self.high:{spec}})"


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def processor_time(device: torch.device) -> float:
    """On the CPU, seconds of this process, all threads together: what other programs take does not count; else ``now``."""
    return time.process_time() if device.type == "cpu" else now(device)


def alternate(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Callable[[torch.device], float] = now,
) -> dict[str, list[float]]:
    """Time actions in turn, A B A B, so that a machine that slows down slows all of them.

    Args:
        actions: What to time, by name; each is called once more beforehand, untimed.
        rounds: Times that each is timed.
        device: Where they compute; its queue is empty before and after each.
        clock: Seconds, once the device has done what it was given: ``now`` or ``processor_time``.

    Returns:
        Seconds by name, one entry a round: entry i of all names was measured in the same round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(rounds):
        for name, action in actions.items():
            start = clock(device)
            action()
            seconds[name].append(clock(device) - start)
    return seconds


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Divide round by round."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def noise_warning(again: Spread) -> list[str]:
    """Say that times cannot be told apart where an action differs from itself.

    Args:
        again: An action's times in units of those of the very same action, which would be 1 on an idle machine.

    Returns:
        A line, or none where all rounds are within ``QUIET``.
    """
    if max(again.high - 1, 1 - again.low) <= QUIET:
        return []
    return [
        f"THIS MACHINE IS NOT IDLE: what was timed twice in each round took {again.low:.2f} to {again.high:.2f} times as long "
        "the second time. Bars on times that are kept or missed here say little."
    ]


class Stopwatch:
    """Seconds by phase; the time of a phase inside another counts for the inner one alone.

    Args:
        device: Where the phases compute; waited for at both ends of each.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()
        self._inner: list[float] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the context as a phase."""
        start = now(self.device)
        self._inner.append(0.0)
        try:
            yield
        finally:
            total = now(self.device) - start
            own = total - self._inner.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + own
            if self._inner:
                self._inner[-1] += total

    @contextmanager
    def watching(self, owner: Any, method: str, name: str) -> Iterator[None]:
        """Count all calls of an object's method inside the context as a phase."""
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return original(*args, **kwargs)

        setattr(owner, method, timed)
        try:
            yield
        finally:
            delattr(owner, method)
