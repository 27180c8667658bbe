"""In which order a run draws its samples: a function of the seed alone, not of workers, processes or batch sizes."""

from collections.abc import Sequence

import numpy as np


class SampleOrder:
    """The endless order of a run: epoch after epoch, each a permutation of its own.

    With buckets, every group of consecutive positions holds images of one bucket; a bucket that does not fill its
    last group repeats some of its samples, so that each sample is seen at least once an epoch.

    Args:
        num_samples: Samples of the set, at least 1.
        seed: Seed of the order.
        buckets: Bucket of every sample, any hashable numbers; ``None``: all in one.
        group: Consecutive positions that share a bucket: the batch of one optimizer step over all processes.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        *,
        buckets: Sequence[int] | None = None,
        group: int = 1,
    ) -> None:
        self.seed, self.group = seed, group
        members = np.zeros(num_samples, dtype=int) if buckets is None else np.asarray(buckets)
        self._buckets = [np.flatnonzero(members == bucket) for bucket in np.unique(members)]
        if buckets is None:
            self.epoch_length = num_samples
        else:
            self.epoch_length = sum(-(-len(b) // group) * group for b in self._buckets)
        self._epoch: tuple[int, np.ndarray] | None = None

    def __call__(self, position: int) -> tuple[int, int]:
        """Return epoch and sample at a position of the run, both 0-based."""
        epoch, place = divmod(position, self.epoch_length)
        return epoch, int(self._indices(epoch)[place])

    def _indices(self, epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._draw(np.random.default_rng((self.seed, epoch))))
        return self._epoch[1]

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        shuffled = [rng.permutation(bucket) for bucket in self._buckets]
        if self.epoch_length == len(shuffled[0]):
            return shuffled[0]
        groups = np.concatenate(
            [np.resize(bucket, (-(-len(bucket) // self.group), self.group)) for bucket in shuffled]
        )
        return rng.permutation(groups).flatten()


def sample_seed(seed: int, position: int) -> int:
    """Seed of everything that is drawn at one position of a run, or for one sample of a set; both 0-based.

    Returns:
        A seed for ``torch.Generator``, in 0 ... 2^63 - 1.
    """
    state = np.random.SeedSequence((seed, position)).generate_state(1, np.uint64)
    return int(state[0] >> 1)
