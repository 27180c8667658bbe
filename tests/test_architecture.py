"""The rules that hold the repository together, read from its sources."""

import ast
import graphlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = sorted((ROOT / "dreamcache_core").rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))
RESEARCH = sorted((ROOT / "research").rglob("*.py"))
CORE_ENTRY = ROOT / "dreamcache_core" / "__init__.py"
ENTRY = [path for path in [ROOT / "__init__.py"] if path.exists()]
PUBLISHED = [*ENTRY, *NODES, *CORE]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# Modules that run inside the U-Net or beside it: no synchronisation with the device, any device.
HOT = [*NODES, *(path for path in CORE if path.stem in ("adapter", "blending", "injection"))]

HOST_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "comfyui_version",
    "folder_paths",
    "nodes",
}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "subprocess"}
UNSAFE_BUILTINS = {"eval", "exec", "compile", "__import__"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=name_of)


def nodes_of(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))


def absolute_imports(path: Path) -> set[str]:
    """First parts of the modules that a file imports by absolute name."""
    names: set[str] = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def relative_imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Where a file's relative imports lead, as path parts below the repository.

    ``from ..a import b`` in ``nodes/c.py`` gives ``("a",)``; ``from .. import a`` gives ``("a",)``
    too; what leaves the repository starts with ``".."``.
    """
    package = path.relative_to(ROOT).parts[:-1]
    for node in nodes_of(path):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        up = node.level - 1
        base = package[: len(package) - up] if up <= len(package) else ("..",)
        if node.module:
            yield (*base, *node.module.split("."))
        else:
            yield from ((*base, alias.name) for alias in node.names)


def module_file(path: Path) -> Path | None:
    """The file of a module or package whose name is a path without suffix."""
    files = (path.with_name(f"{path.name}.py"), path / "__init__.py")
    return next((file for file in files if file.exists()), None)


def imported_modules(path: Path) -> set[Path]:
    """Files of the repository that a file imports relatively, wherever in it the import stands."""
    found: set[Path] = set()
    for node in nodes_of(path):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for alias in node.names:
            found.add(module_file(base / alias.name) or module_file(base) or base)
    return found


FOLDERS = [
    "files",
    "images",
    "method",
    "fitting",
    "pipeline",
    "data",
    "training",
    "demo",
    "evaluation",
    "cli",
]
"""Of the core, in the order of imports: a folder imports from those before it, the modules beside them from none."""


def rank(path: Path) -> int:
    first = path.relative_to(ROOT / "dreamcache_core").parts[0]
    return FOLDERS.index(first) if first in FOLDERS else -1


def test_every_folder_of_the_core_has_its_place() -> None:
    parts = {path.relative_to(ROOT / "dreamcache_core").parts for path in CORE}
    assert {first for first, *rest in parts if rest} == set(FOLDERS)


@each([path for path in CORE if path.name not in ("__main__.py",) and path != CORE_ENTRY])
def test_folders_of_the_core_import_in_one_direction(path: Path) -> None:
    above = {name_of(target) for target in imported_modules(path) if rank(target) > rank(path)}
    assert above == set()
    assert CORE_ENTRY not in imported_modules(path)


@each([path for path in NODES if "host" in path.relative_to(ROOT / "nodes").parts])
def test_what_talks_to_comfyui_knows_no_node(path: Path) -> None:
    nodes = {target for target in imported_modules(path) if target.parent == ROOT / "nodes"}
    assert nodes == set()


@pytest.mark.parametrize("paths", [CORE, NODES, RESEARCH], ids=["core", "nodes", "research"])
def test_no_module_imports_itself_through_others(paths: list[Path]) -> None:
    graph = {path: imported_modules(path) & set(paths) - {path} for path in paths}
    sorter = graphlib.TopologicalSorter(graph)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(name_of(path) for path in error.args[1]))


def test_no_folder_has_more_than_a_dozen_modules() -> None:
    folders = Counter(path.parent for path in (*CORE, *NODES, *RESEARCH) if path.stem != "__init__")
    assert {name_of(folder): n for folder, n in folders.items() if n > 12} == {}


@each(CORE)
def test_core_imports_nothing_of_the_host(path: Path) -> None:
    assert not absolute_imports(path) & HOST_MODULES


@each(CORE)
def test_core_imports_itself_relatively_and_stays_inside(path: Path) -> None:
    assert not absolute_imports(path) & {"benchmarks", "dreamcache_core", "research"}
    assert [t for t in relative_imports(path) if t[0] != "dreamcache_core"] == []


@each(NODES)
def test_nodes_reach_the_core_only_by_relative_imports(path: Path) -> None:
    assert not absolute_imports(path) & {"dreamcache_core", "nodes"}
    assert [t for t in relative_imports(path) if t[0] not in ("dreamcache_core", "nodes")] == []


@each(ENTRY)
def test_entry_imports_only_the_nodes_of_the_pack(path: Path) -> None:
    assert not absolute_imports(path) & {"dreamcache_core", "nodes"}
    assert {target[0] for target in relative_imports(path)} <= {"nodes"}


def test_importing_the_core_is_light() -> None:
    code = "import sys, dreamcache_core; print(*{name.split('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    heavy = {*HOST_MODULES, "accelerate", "diffusers", "transformers"}
    assert not heavy & set(result.stdout.split())


def test_version_is_the_top_entry_of_the_changelog() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    entries = re.findall(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)
    assert versions == entries[:1]


def test_registry_classifiers_are_ones_that_it_accepts() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    given = set(re.findall(r'"(Environment :: .+|Operating System :: .+)"', project))
    devices = ("NVIDIA CUDA", "AMD ROCm", "Intel Arc", "Apple Metal")
    known = {f"Environment :: GPU :: {device}" for device in devices}
    assert given == known | {
        "Environment :: NPU :: Huawei Ascend",
        "Operating System :: OS Independent",
    }


@each(HOT)
def test_hot_modules_read_nothing_back_and_name_no_device(path: Path) -> None:
    for node in nodes_of(path):
        is_item = isinstance(node, ast.Attribute) and node.attr == "item"
        assert not is_item, f"{name_of(path)}:{getattr(node, 'lineno', 0)} calls .item()"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.fullmatch(r"cuda(:\d+)?", node.value), f"{name_of(path)}:{node.lineno}"


@each(HOT)
def test_hot_modules_pool_by_area_as_every_device_can(path: Path) -> None:
    """Apple's GPUs have ``interpolate(mode="area")`` for whole ratios only; ``pool_area`` does the same for all."""
    keywords = [node for node in nodes_of(path) if isinstance(node, ast.keyword)]
    modes = [ast.unparse(keyword.value) for keyword in keywords if keyword.arg == "mode"]
    assert "'area'" not in modes


def test_setting_the_compiler_aside_does_not_load_it() -> None:
    code = (
        "import sys; from dreamcache_core.method.compiling import uncompiled\n"
        "with uncompiled: pass\nprint('torch._dynamo' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "False", result.stderr


READS_BACK = {"item", "tolist", "cpu", "numpy", "nonzero", "isfinite", "aminmax", "any", "all"}
IN_EVERY_BLOCK = {
    "dreamcache_core/method/adapter.py": {
        "attend",
        "merge_attention",
        "forward",
        "torch_attention",
    },
    "dreamcache_core/method/blending.py": {
        "blend_references",
        "_rows_of",
        "_region_weights",
        "pool_area",
        "_covered",
    },
    "dreamcache_core/method/injection.py": {"replace_output", "check_rows", "index_on"},
    "nodes/host/unet/patches.py": {"add_patches"},
}


@pytest.mark.parametrize("file", IN_EVERY_BLOCK)
def test_what_runs_in_every_block_never_waits_for_the_device(file: str) -> None:
    functions = [
        node
        for node in nodes_of(ROOT / file)
        if isinstance(node, ast.FunctionDef) and node.name in IN_EVERY_BLOCK[file]
    ]
    assert {function.name for function in functions} == IN_EVERY_BLOCK[file]
    for function in functions:
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute):
                assert node.attr not in READS_BACK, f"{file}:{node.lineno} .{node.attr}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"float", "int", "bool"}, f"{file}:{node.lineno}"


@each(PUBLISHED)
def test_published_modules_parse_as_python_3_10(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=(3, 10))


@each(PUBLISHED)
def test_published_modules_execute_nothing_from_data(path: Path) -> None:
    assert not absolute_imports(path) & UNSAFE_MODULES
    used = {node.id for node in nodes_of(path) if isinstance(node, ast.Name)}
    assert not used & UNSAFE_BUILTINS


@each([*PUBLISHED, *TESTS])
def test_sources_are_ascii(path: Path) -> None:
    assert path.read_bytes().isascii()


def test_test_files_have_unique_names_and_no_packages() -> None:
    names = [path.name for path in TESTS if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
    assert "__init__.py" not in names
