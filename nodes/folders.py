"""Where adapters and saved references lie on disk, as ComfyUI knows its folders."""

import os
from collections.abc import Iterator

import folder_paths

from ..dreamcache_core import InputError
from ..dreamcache_core.checkpoints import WHERE_FROM

FOLDER = "dreamcache"
EXTENSIONS = {".safetensors", ".pt"}
REFERENCES = "references"
PLACEHOLDER = "no adapter file found: put one into models/dreamcache and press R"
NO_REFERENCE = "no saved reference found: make one with Save Reference"


def register_folders() -> None:
    """Make ``models/dreamcache`` known to ComfyUI, beside what ``extra_model_paths.yaml`` names."""
    default = os.path.join(folder_paths.models_dir, FOLDER)
    os.makedirs(os.path.join(default, REFERENCES), exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, default)
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | EXTENSIONS)


def list_adapter_files() -> list[str]:
    """List adapter files for the combo; a hint where there is none."""
    names = [
        name
        for name in folder_paths.get_filename_list(FOLDER)
        if name.replace("\\", "/").split("/")[0] != REFERENCES
    ]
    return names or [PLACEHOLDER]


def adapter_path(name: str) -> str:
    """Find an adapter file.

    Args:
        name: Entry of the combo.

    Returns:
        Its full path.

    Raises:
        InputError: No such file; the message lists the folders and where adapters come from.
    """
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths(FOLDER))
        raise InputError(
            f"There is no adapter file {name!r}. Put a .safetensors or .pt file into one of: {searched}. Then press R to "
            f"refresh the list. {WHERE_FROM}"
        )
    return path


def list_reference_files() -> list[str]:
    """List saved references for the combo; a hint where there is none."""
    names = [
        f"{name} [{label}]"
        for label, folder in _reference_roots()
        if os.path.isdir(folder)
        for name in sorted(folder_paths.recursive_search(folder, [".git"])[0])
        if name.endswith(".safetensors")
    ]
    return names or [NO_REFERENCE]


def reference_path(choice: str) -> str:
    """Find a saved reference.

    Args:
        choice: Entry of the combo: ``name [output]``, ``name [input]`` or ``name [references]``.

    Returns:
        Its full path.

    Raises:
        InputError: No such file, or one outside the named folder.
    """
    name, _, label = choice.rpartition(" [")
    for root_label, folder in _reference_roots():
        if f"{root_label}]" != label:
            continue
        path = os.path.abspath(os.path.join(folder, name))
        inside = os.path.commonpath([path, os.path.abspath(folder)]) == os.path.abspath(folder)
        if inside and os.path.isfile(path):
            return path
    searched = ", ".join(folder for _, folder in _reference_roots())
    raise InputError(
        f"There is no saved reference {choice!r}. Expected 'name [output]', 'name [input]' or 'name [references]' below "
        f"{searched}. Make one with Save Reference and press R."
    )


def new_reference_path(prefix: str) -> str:
    """Choose the file that a reference is saved to, below ComfyUI's output folder.

    Args:
        prefix: File name prefix, subfolders allowed.

    Returns:
        A path that does not exist yet; its folder exists.

    Raises:
        InputError: The prefix leads out of the output folder.
    """
    name = os.path.basename(prefix).strip()
    if name in ("", ".", "..") or "\0" in prefix:
        raise InputError(
            f"A reference needs a file name; the prefix {prefix!r} has none. Give a name such as dreamcache/my_dog."
        )
    output = os.path.realpath(folder_paths.get_output_directory())
    target = os.path.realpath(os.path.join(output, os.path.dirname(os.path.normpath(prefix))))
    if os.path.isabs(prefix) or os.path.commonpath([output, target]) != output:
        raise InputError(
            f"References are saved below ComfyUI's output folder; the prefix {prefix!r} leads out of it. Give a name "
            "such as dreamcache/my_dog."
        )
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, output)
    return os.path.join(folder, f"{name}_{counter:05}_.safetensors")


def file_state(path: str) -> str:
    """Fingerprint of a file for ComfyUI's output cache: it changes when the file does."""
    stat = os.stat(path)
    return f"{path}:{stat.st_mtime_ns}:{stat.st_size}"


def _reference_roots() -> Iterator[tuple[str, str]]:
    yield "output", folder_paths.get_output_directory()
    yield "input", folder_paths.get_input_directory()
    for folder in folder_paths.get_folder_paths(FOLDER):
        yield REFERENCES, os.path.join(folder, REFERENCES)
