"""One server for each ComfyUI of this machine, and what the tests of both kinds need from it."""

from typing import Any

import pytest
from comfy_installs import WHY_NONE, ComfyInstall, comfyui_folders
from comfy_server import ADAPTERS, Server, running_server, write_adapters

INSTALLS = [ComfyInstall(path) for path in comfyui_folders()]
PLACEHOLDER = "no adapter file found: put one into models/dreamcache and press R"


NONE = pytest.param(None, marks=pytest.mark.skip(reason=WHY_NONE), id="none")


@pytest.fixture(scope="session", params=[pytest.param(i, id=i.version) for i in INSTALLS] or [NONE])
def server(request, tmp_path_factory):
    base = tmp_path_factory.mktemp(f"comfyui-{request.param.version}-")
    with running_server(request.param, base) as running:
        yield running


@pytest.fixture(scope="session")
def object_info(server: Server) -> dict[str, Any]:
    return server.get_json("/object_info")


@pytest.fixture(scope="session")
def adapters(server: Server) -> str:
    """Install the adapter file; its name in the list, which named the folder before."""
    path = server.base / "models" / "dreamcache" / ADAPTERS
    assert server.adapter_choices() == [PLACEHOLDER]
    write_adapters(path)
    return path.name
