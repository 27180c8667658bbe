"""Where adapters and saved references lie on disk, as ComfyUI knows its folders."""

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, islice

import folder_paths

from ...dreamcache_core import InputError
from ...dreamcache_core.data.sources.captioned import MASKS
from ...dreamcache_core.files.tensor_file import shorten
from ...dreamcache_core.files.walking import Listing, list_folder, walk_folders
from ...dreamcache_core.images.files import image_endings, is_image_name
from ...dreamcache_core.method.adapter_files import WHERE_FROM
from ...dreamcache_core.names import printable

logger = logging.getLogger(__name__)

FOLDER = "dreamcache"
EXTENSIONS = {".safetensors", ".pt"}
REFERENCES = "references"
NO_ADAPTERS = "no adapter file found: put one into models/dreamcache and press R"
NO_FOLDER = "no folder with images found: make one below ComfyUI's input folder"
NO_REFERENCE = "no saved reference found: make one with Save Reference"


def register_folders() -> None:
    """Make ``models/dreamcache`` known to ComfyUI, beside what ``extra_model_paths.yaml`` names."""
    default = os.path.join(folder_paths.models_dir, FOLDER)
    try:
        os.makedirs(os.path.join(default, REFERENCES), exist_ok=True)
    except OSError as error:
        # a models folder that is shared and read-only must not cost the user all nodes
        logger.warning(
            "DreamCache cannot make %s (%s). Nodes that save adapters need it; all others work.",
            default,
            error.strerror,
        )
    folder_paths.add_model_folder_path(FOLDER, default)
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | EXTENSIONS)


def list_adapter_files() -> list[str]:
    """List adapter files for the combo; a hint where there is none."""
    # not get_filename_list, which follows links in circles
    folders, endings = folder_paths.folder_names_and_paths[FOLDER]
    names = {
        os.path.join(below, file)
        for folder in folders
        for below, files in _walk(folder)
        if below.split(os.sep)[0] != REFERENCES
        for file in files
        if os.path.splitext(file)[1].lower() in endings
    }
    return sorted(names) or [NO_ADAPTERS]


def adapter_path(name: str) -> str:
    """Find an adapter file.

    Args:
        name: Entry of the combo.

    Returns:
        Its full path.

    Raises:
        InputError: No such file; the message lists the folders and where adapters come from.
    """
    path = folder_paths.get_full_path(FOLDER, str(name))  # over the API it may be anything
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths(FOLDER))
        raise InputError(
            f"There is no adapter file {name!r}. Put a .safetensors or .pt file into one of: {searched}. Then press R to "
            f"refresh the list. {WHERE_FROM}"
        )
    return path


def list_reference_files() -> list[str]:
    """List saved references for the combo; a hint where there is none.

    Of the output and input folders, which may hold very many files, only what lies directly in them or below their folder
    ``dreamcache`` is listed; ``reference_path`` finds the others too.
    """
    names: list[str] = []
    for label, folder in _reference_roots():
        walked = _walk(folder)
        if label != REFERENCES:
            below = _walk(os.path.join(folder, FOLDER))
            walked = chain(
                islice(walked, 1), ((os.path.join(FOLDER, path), found) for path, found in below)
            )
        files = [
            os.path.join(path, file)
            for path, found in walked
            for file in found
            if file.endswith(".safetensors")
        ]
        names += [f"{file} [{label}]" for file in sorted(files)]
    return names or [NO_REFERENCE]


def is_listed(path: str) -> bool:
    """Whether ``list_reference_files`` looks where a new reference was saved below ComfyUI's output folder."""
    first, *rest = os.path.relpath(path, folder_paths.get_output_directory()).split(os.sep)
    return not rest or first == FOLDER


def reference_path(choice: str) -> str:
    """Find a saved reference.

    Args:
        choice: Entry of the combo: ``name [output]``, ``name [input]`` or ``name [references]``.

    Returns:
        Its full path.

    Raises:
        InputError: No such file, or one outside the named folder.
    """
    name, _, label = str(choice).rpartition(" [")
    for root_label, folder in _reference_roots():
        if f"{root_label}]" != label:
            continue
        path = os.path.abspath(os.path.join(folder, name.replace("\\", "/")))
        if _is_inside(path, folder) and os.path.isfile(path):
            return path
    searched = ", ".join(folder for _, folder in _reference_roots())
    raise InputError(
        f"There is no saved reference {choice!r}. Expected 'name [output]', 'name [input]' or 'name [references]' below "
        f"{searched}. Make one with Save Reference and press R."
    )


def list_image_folders() -> list[str]:
    """List folders with images below ComfyUI's input folder for the combo; a hint where there is none."""
    names = [
        path.replace("\\", "/")
        for path, files in _walk(folder_paths.get_input_directory())
        if path and any(map(is_image_name, files))
    ]
    return sorted(names) or [NO_FOLDER]


def image_paths(name: str) -> list[str]:
    """Find the images of a folder below ComfyUI's input folder, sorted by name; not those of its subfolders.

    Files whose names begin with a dot are passed over.

    Args:
        name: Entry of the combo.

    Returns:
        Their full paths, at least one.

    Raises:
        InputError: There is no such folder with images, or it is outside the input folder.
    """
    root = os.path.abspath(folder_paths.get_input_directory())
    paths = [path for path in _files_of(root, name) if is_image_name(path)]
    if not paths:
        raise InputError(
            f"There is no folder {name!r} with images below {root}. Expected {', '.join(image_endings())} files in it. Make "
            "one, and press R."
        )
    return paths


def list_set_folders() -> list[str]:
    """List folders below ComfyUI's input folder that hold images at any depth for the combo; a hint where there is none."""
    names: set[str] = set()
    for path, files in _walk(folder_paths.get_input_directory()):
        parts = path.replace("\\", "/").split("/")
        if path and MASKS not in map(str.lower, parts) and any(map(is_image_name, files)):
            names |= {"/".join(parts[: depth + 1]) for depth in range(len(parts))}
    return sorted(names) or [NO_FOLDER]


def set_folder(name: str) -> str:
    """Find a folder below ComfyUI's input folder.

    Args:
        name: Entry of the combo.

    Returns:
        Its full path.

    Raises:
        InputError: There is none, or it is outside the input folder.
    """
    root = os.path.abspath(folder_paths.get_input_directory())
    folder = os.path.abspath(os.path.join(root, str(name)))
    if folder == root or not _is_inside(folder, root) or not os.path.isdir(folder):
        raise InputError(
            f"There is no folder {name!r} below {root}. Put the training images into a folder there, and press R."
        )
    return folder


def set_files(name: str) -> list[str]:
    """Full paths of all files of ``set_folder``, at any depth."""
    folder = set_folder(name)
    return [os.path.join(folder, below, file) for below, files in _walk(folder) for file in files]


def left_out(name: str) -> str:
    """Name the files of a folder below ComfyUI's input folder that are no images to us; empty where there are none."""
    files = _files_of(os.path.abspath(folder_paths.get_input_directory()), name)
    others = shorten(os.path.basename(file) for file in files if not is_image_name(file))
    return f"left out, as it is no image of a kind that is read: {others}; " if others else ""


def check_choice(find: Callable[[str], object], choice: str | None) -> bool | str:
    """Check a combo's entry before anything runs; the core would only say that it is not in the list.

    Args:
        find: What finds the file, and raises ``InputError`` where it cannot.
        choice: Entry of the combo; ``None`` where it comes over a link.

    Returns:
        True, or what is wrong, as a node's ``validate_inputs`` returns it.
    """
    try:
        if choice is not None:
            find(choice)
    except InputError as error:
        return str(error)
    return True


def new_adapter_path(prefix: str) -> AbstractContextManager[str]:
    """Choose the file that adapters are saved to, in the first ``models/dreamcache`` folder.

    Args:
        prefix: File name prefix, subfolders allowed.

    Returns:
        Context of the path, which is nobody else's: an empty file to be replaced, removed after an exception.

    Raises:
        InputError: The prefix has no name, leads out of the folder or to where references lie, or the folder cannot be
            made.
    """
    rule = f"Adapters are saved by name below models/{FOLDER}, and not in its folder {REFERENCES}"
    root = folder_paths.get_folder_paths(FOLDER)[0]
    return _new_path(prefix, root, rule, "my_adapters", reserved=REFERENCES)


def new_reference_path(prefix: str) -> AbstractContextManager[str]:
    """Choose the file that a reference is saved to, below ComfyUI's output folder.

    Args:
        prefix: File name prefix, subfolders allowed.

    Returns:
        See ``new_adapter_path``.

    Raises:
        InputError: The prefix has no name or leads out of the output folder, or the folder cannot be made.
    """
    rule = "References are saved by name below ComfyUI's output folder"
    return _new_path(prefix, folder_paths.get_output_directory(), rule, "dreamcache/my_dog")


def choice_state(find: Callable[[str], str | list[str]], choice: str | None) -> str:
    """Fingerprint of a combo's entry for ComfyUI's output cache.

    Args:
        find: What finds its file or files.
        choice: Entry of the combo; ``None`` where it comes over a link.

    Returns:
        A text that changes when a file does; always the same for a link, whose source ComfyUI looks at itself.
    """
    if choice is None:
        return ""
    found = find(choice)
    paths = [found] if isinstance(found, str) else found
    stats = [(path, os.stat(path)) for path in paths]
    return "\n".join(f"{path}:{stat.st_mtime_ns}:{stat.st_size}" for path, stat in stats)


_listed: dict[str, tuple[float, Listing]] = {}
"""When a folder that was listed had changed last, and what lay in it."""


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Walk a folder, see ``walk_folders``; one that did not change is not listed again."""
    return walk_folders(folder, read=_list_changed)


def _list_changed(folder: str) -> Listing:
    changed = os.path.getmtime(folder)
    if folder not in _listed or _listed[folder][0] != changed:
        _listed[folder] = (changed, list_folder(folder))
    return _listed[folder][1]


def _files_of(root: str, name: str) -> list[str]:
    """Full paths of a folder's files, but for hidden ones; none where it is not inside ``root``."""
    folder = os.path.abspath(os.path.join(root, str(name)))
    if not _is_inside(folder, root) or not os.path.isdir(folder):
        return []
    paths = [os.path.join(folder, f) for f in sorted(os.listdir(folder)) if not f.startswith(".")]
    return [path for path in paths if os.path.isfile(path)]


def _is_inside(path: str, folder: str) -> bool:
    """Whether an absolute path lies in a folder, or is it."""
    try:
        return os.path.commonpath([path, os.path.abspath(folder)]) == os.path.abspath(folder)
    except ValueError:
        return False  # on another drive


def _reference_roots() -> Iterator[tuple[str, str]]:
    yield "output", folder_paths.get_output_directory()
    yield "input", folder_paths.get_input_directory()
    for folder in folder_paths.get_folder_paths(FOLDER):
        yield REFERENCES, os.path.join(folder, REFERENCES)


def _fill_dates(prefix: str) -> str:
    """Fill in ``%date:yyyy-MM-dd%`` and the like, which ComfyUI's page does for its own nodes alone."""
    now = time.localtime()
    numbers = {
        "d": now.tm_mday,
        "M": now.tm_mon,
        "h": now.tm_hour,
        "m": now.tm_min,
        "s": now.tm_sec,
    }

    def number(code: re.Match[str]) -> str:
        if code[0] in ("yy", "yyyy"):
            return str(now.tm_year)[-len(code[0]) :]
        return f"{numbers[code[0][0]]:0{len(code[0])}}"

    def date(form: re.Match[str]) -> str:
        return re.sub("yyyy|yy|dd?|MM?|hh?|mm?|ss?", number, form[1])

    return re.sub("%date:(.*?)%", date, prefix)


@contextmanager
def _new_path(prefix: str, root: str, rule: str, example: str, reserved: str = "") -> Iterator[str]:
    """Number a new file below a folder; refuse a prefix without a name, outside, or in a reserved subfolder."""
    name = _fill_dates(prefix.strip()).replace("\\", "/")
    parts = [part for part in name.split("/") if part != "."]
    is_outside = ".." in parts or os.path.isabs(name) or ":" in name or name != printable(name)
    is_nameless = os.path.basename(name).strip() in ("", ".")
    if is_outside or is_nameless or parts[0] == reserved:
        raise InputError(f"{rule}; given {prefix!r}. Give a name such as {example}.")
    root = os.path.abspath(root)
    try:
        os.makedirs(root, exist_ok=True)
        path = _claim("/".join(parts), root)
    except OSError as error:
        cure = (
            "Make the folder writable, or give ComfyUI another one (extra_model_paths.yaml for models, --output-directory "
            "for outputs)."
        )
        if error.errno == errno.ENAMETOOLONG:
            cure = "Give a shorter name."
        raise InputError(f"Cannot write into {root}: {error.strerror}. {cure}") from error
    try:
        yield path
    except BaseException:
        os.unlink(path)
        raise


def _claim(prefix: str, root: str) -> str:
    """Make the first file of a prefix whose number is free, empty; another process may be doing the same."""
    while True:
        try:
            folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, root)
        except OSError:
            raise
        except Exception as error:  # ComfyUI's refusal of a link that leads elsewhere has no type
            raise InputError(
                f"{os.path.dirname(prefix)!r} leads out of {root}, which ComfyUI does not allow. Give another folder."
            ) from error
        path = os.path.join(folder, f"{name}_{counter:05}_.safetensors")
        try:
            with open(path, "xb"):
                return path
        except FileExistsError:
            continue
