"""Precomputed training sets: VAE latents and text states in safetensors shards, beside an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...config import differences
from ...errors import FileFormatError, InputError
from ...files.tensor_file import raw_bytes
from ...files.texts import parse_json, read_json
from ...files.whole_files import whole_file
from ...method.cache import LATENT_FACTOR

FORMAT = "encoded/1"
INDEX_FILE = "index.json"


ALTERATION_FIELDS = ("reference_flip", "reference_jitter", "reference_erase")
"""Fields of the index that say what may have happened to the references."""

COMPARED = (
    "data_fingerprint",
    "model_fingerprint",
    "resolution",
    "sizes",
    "samples_per_shard",
    "num_variants",
    "dtype",
    "seed",
    *ALTERATION_FIELDS,
)
"""Fields of the index in which a set must agree with what is already in its folder."""

MAX_SIDE_PX = 4096
"""Longest side of a target: twice the largest resolution, see ``buckets.MAX_ASPECT``."""

IDENTITY_KEY = "dreamcache.encoded"
"""Key in a shard's metadata of its set's identity and its tensors' digests."""


@dataclass(frozen=True)
class EncodedIndex:
    """What a precomputed set says of itself.

    Attributes:
        keys: Name of every pair, in the order of the set that was encoded.
        sizes: Height and width of every target, pixels.
        captions: Caption of every pair.
        samples_per_shard: Pairs in a file, but for the last.
        num_variants: Latents of differently augmented references for every pair; 0: none.
        has_pooled: Whether there are SDXL's pooled text vectors.
        resolution: Side of the reference square, pixels.
        data_fingerprint: Of the set that was encoded.
        model_fingerprint: Of the VAE and text encoders.
        dtype: Float type of the tensors.
        seed: Seed of the references' augmentation.
        reference_flip: Whether references may be mirrored.
        reference_jitter: Whether their colours may be altered.
        reference_erase: Whether a part of them may be white.
        format: Version of this layout.
    """

    keys: Sequence[str]
    sizes: Sequence[tuple[int, int]]
    captions: Sequence[str]
    samples_per_shard: int
    num_variants: int
    has_pooled: bool
    resolution: int
    data_fingerprint: str
    model_fingerprint: str
    dtype: str
    seed: int
    reference_flip: bool = True
    reference_jitter: bool = True
    reference_erase: bool = True
    format: str = FORMAT

    @property
    def identity(self) -> str:
        """Hash of all fields in which a shard must agree with its set."""
        values = json.dumps({name: getattr(self, name) for name in COMPARED})
        return hashlib.sha256(values.encode()).hexdigest()

    def indices(self, shard: int) -> range:
        """Pairs of a shard."""
        first = shard * self.samples_per_shard
        return range(len(self.sizes))[first : first + self.samples_per_shard]

    def save(self, path: Path) -> None:
        """Write the index, all or nothing."""
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> EncodedIndex:
        """Read the index of a set.

        Raises:
            FileFormatError: There is none, or it is damaged or of another version.
        """
        try:
            values = read_json(path)
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']}")
            values["sizes"] = [(height, width) for height, width in values["sizes"]]
            index = cls(**values)
            index._check()
            return index
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(
                f"{path.parent} is no complete precomputed set ({type(error).__name__}: {error}). Run 'dataset encode' again: "
                "it goes on where it stopped."
            ) from error

    def _check(self) -> None:
        """Refuse what no program of ours has written.

        Raises:
            ValueError: It is that.
        """
        texts = ("data_fingerprint", "model_fingerprint", "dtype")
        flags = ("has_pooled", *ALTERATION_FIELDS)
        lowest = {"samples_per_shard": 1, "num_variants": 0, "seed": 0}
        is_sound = {
            "sizes": bool(self.sizes)
            and all(_is_side(side) for size in self.sizes for side in size),
            "resolution": _is_side(self.resolution),
            **{name: self._has_text_each(name) for name in ("keys", "captions")},
            **{name: isinstance(getattr(self, name), str) for name in texts},
            **{name: isinstance(getattr(self, name), bool) for name in flags},
            **{name: _is_whole(getattr(self, name), low) for name, low in lowest.items()},
        }
        wrong = [name for name, is_so in is_sound.items() if not is_so]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: not what 'dataset encode' writes")

    def _has_text_each(self, name: str) -> bool:
        """Whether a field is a list with a text for every pair."""
        values = getattr(self, name)
        is_list = isinstance(values, list) and len(values) == len(self.sizes)
        return is_list and all(isinstance(value, str) for value in values)


def _is_whole(value: object, low: int) -> bool:
    return type(value) is int and value >= low


def _is_side(value: object) -> bool:
    return type(value) is int and value in range(LATENT_FACTOR, MAX_SIDE_PX + 1, LATENT_FACTOR)


class EncodedSet:
    """Random access to a precomputed set.

    Args:
        folder: Folder that ``dataset encode`` wrote.

    Raises:
        FileFormatError: The folder holds no complete precomputed set.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = EncodedIndex.load(self.folder / INDEX_FILE)
        self._open: dict[int, Any] = {}

    def read_target(self, index: int) -> dict[str, Tensor]:
        """Read what belongs to the target of a pair.

        Returns:
            ``target_latent`` (channels, height / 8, width / 8), ``text_states`` (tokens, width) and for SDXL
            ``text_pooled`` (width,).

        Raises:
            FileFormatError: A shard is missing or damaged.
        """
        pooled = ["text_pooled"] if self.index.has_pooled else []
        return {name: self._read(index, name) for name in ("target_latent", "text_states", *pooled)}

    def read_reference(self, index: int, epoch: int) -> dict[str, Tensor]:
        """Read the latent of a pair's reference: in every epoch the next of its variants.

        Returns:
            ``reference_latent``, (channels, resolution / 8, resolution / 8).

        Raises:
            FileFormatError: A shard is missing or damaged.
        """
        variant = epoch % self.index.num_variants
        return {"reference_latent": self._read(index, f"reference_latent.{variant}")}

    def _read(self, index: int, name: str) -> Tensor:
        shard, key = index // self.index.samples_per_shard, f"{index}.{name}"
        path = self.folder / shard_name(shard)
        try:
            if shard not in self._open:
                self._open[shard] = self._open_shard(path)
            file, digests = self._open[shard]
            tensor: Tensor = file.get_tensor(key)
            if digests and digests.get(key) != _digest(tensor):
                raise ValueError(f"{key} has other values than were written")
            return tensor
        except (SafetensorError, OSError, ValueError) as error:
            raise FileFormatError(
                f"{path} is missing or damaged ({error}). Delete it and run 'dataset encode' again."
            ) from error

    def _open_shard(self, path: Path) -> tuple[Any, Mapping[str, str]]:
        """Open a shard -> the file, and the digests of its tensors; none where it is older than they are."""
        file: Any = safe_open(path, framework="pt", device="cpu")
        identity, digests = split_metadata(file.metadata())
        if identity != self.index.identity:
            raise ValueError("it belongs to another set")
        digests = parse_json(digests or "{}")
        if not isinstance(digests, dict):
            raise ValueError("its digests are none")  # noqa: TRY004
        return file, digests

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind: every reading process opens its own."""
        return {**self.__dict__, "_open": {}}


def shard_metadata(tensors: Mapping[str, Tensor], index: EncodedIndex) -> dict[str, str]:
    """Metadata of a shard: its set's identity, and the digest of each tensor."""
    digests = {key: _digest(tensor) for key, tensor in tensors.items()}
    # one entry: the order of several in the file is not always the same
    return {IDENTITY_KEY: f"{index.identity} {json.dumps(digests)}"}


def split_metadata(metadata: Mapping[str, str] | None) -> tuple[str, str]:
    """Return the identity of a shard's set and the digests of its tensors as JSON, empty where it is older than these."""
    identity, _, digests = (metadata or {}).get(IDENTITY_KEY, "").partition(" ")
    return identity, digests


def _digest(tensor: Tensor) -> str:
    shape = f"{tensor.dtype} {list(tensor.shape)}:".encode()
    return hashlib.sha256(shape + bytes(raw_bytes(tensor))).hexdigest()


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"{number:06d}.safetensors"


def require_same_set(index: EncodedIndex, wanted: Mapping[str, object]) -> None:
    """Refuse a precomputed set that was made from something else than ``wanted``, values by field of its index.

    Raises:
        InputError: A field differs; the message names all that do.
    """
    changes = differences(vars(index), wanted)
    if changes:
        raise InputError(
            f"The precomputed set was made with other settings: {changes}. Run 'dataset encode' into a new folder."
        )
