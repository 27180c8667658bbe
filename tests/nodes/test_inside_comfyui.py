"""The tests of ``inside/``, one result per file, ComfyUI version and mode."""


def test_inside(inside_file, ran_inside):
    comfyui, name = inside_file
    cases = comfyui.cases.get(name, [])
    failed = [
        case for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    details = "\n\n".join(
        f"{case.get('name')}:\n{(case.find('failure') if case.find('failure') is not None else case.find('error')).text}"
        for case in failed
    )
    assert cases, f"{name} ran no test in ComfyUI {comfyui}:\n{comfyui.output[-4000:]}"
    assert not skipped, f"skipped in ComfyUI {comfyui}: {skipped}"
    assert not failed, f"{len(failed)} of {len(cases)} failed in ComfyUI {comfyui}\n{details}"
