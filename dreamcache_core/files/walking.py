"""Folders below a folder, each once, however links lead."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Listing(NamedTuple):
    """Names of what lies in a folder; ``links`` are those of folders that are links."""

    folders: list[str]
    links: list[str]
    files: list[str]


def list_folder(path: str) -> Listing:
    """List a folder.

    Raises:
        OSError: It is not there or cannot be read.
    """
    listing = Listing([], [], [])
    with os.scandir(path) as entries:
        for entry in entries:
            kind = listing.links if entry.is_symlink() else listing.folders
            (kind if entry.is_dir() else listing.files).append(entry.name)
    return listing


def walk_folders(
    root: str,
    *,
    read: Callable[[str], Listing] = list_folder,
    note: Callable[[OSError], object] = lambda _: None,
) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and those below it, each with its files; those whose names begin with a dot are passed over.

    Links may lead in circles: a folder is visited once, by its own name rather than by a link.

    Args:
        root: The folder.
        read: Lists a folder.
        note: Called where one cannot be listed; it is left out.

    Yields:
        The folder's name below ``root``, empty for itself; names of its files.
    """
    pending, links, seen = deque([""]), deque[str](), set[str]()
    while pending or links:
        name = (pending or links).popleft()
        path = os.path.join(root, name) if name else root
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        try:
            listing = read(path)
        except OSError as error:
            note(error)
            continue
        yield name, listing.files
        for found, waiting in ((listing.folders, pending), (listing.links, links)):
            shown = sorted(folder for folder in found if not folder.startswith("."))
            waiting.extend(os.path.join(name, folder) for folder in shown)
