"""The tests of ``inside/``, one result per file and ComfyUI version."""

from pathlib import Path

import pytest

FILES = sorted(path.stem for path in (Path(__file__).parent / "inside").glob("test_*.py"))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FILES)
def test_inside(comfyui, ran_inside, name):
    cases = comfyui.cases.get(name, [])
    failed = [
        case for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    details = "\n\n".join(
        f"{case.get('name')}:\n{(case.find('failure') if case.find('failure') is not None else case.find('error')).text}"
        for case in failed
    )
    assert cases, f"{name} ran no test in ComfyUI {comfyui.version}:\n{comfyui.output[-4000:]}"
    assert not skipped, f"skipped in ComfyUI {comfyui.version}: {skipped}"
    assert not failed, (
        f"{len(failed)} of {len(cases)} failed in ComfyUI {comfyui.version}\n{details}"
    )
