"""Several processes at one job, as torchrun starts them on CPUs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JOB = """
import sys
from pathlib import Path
import torch
from dreamcache_core.errors import StateError
from dreamcache_core.processes import join, require_shared_folder

with join("train") as state:
    group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    print(state.num_processes, group.options._timeout.days)
    try:
        require_shared_folder(Path(sys.argv[1 + state.process_index]), state)
    except StateError as error:
        print(error)
"""


def run_two(*folders: Path) -> list[str]:
    """Run the job in two processes -> what each printed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", JOB, *map(str, folders)]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    return [process.communicate(timeout=300)[0] for process in started]


@pytest.mark.skipif(os.name == "nt", reason="started as on Linux")
def test_processes_join_by_the_environment_alone_and_wait_for_a_month(tmp_path: Path):
    assert run_two(tmp_path / "out", tmp_path / "out") == ["2 30\n", "2 30\n"]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="started as on Linux")
def test_folder_that_is_another_one_elsewhere_is_refused_by_all_at_the_start(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    printed = run_two(tmp_path / "out", tmp_path / "elsewhere")
    assert all("Processes 1 of 2 do not see what process 0 writes" in text for text in printed)
    assert list((tmp_path / "out").iterdir()) == []
