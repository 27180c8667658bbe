"""What ``compiled`` measures: ``python -m benchmarks.inside.compiled '{...}'``. Prints one line of JSON."""

import json
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from .host import load_pack, start_comfyui

PLAIN, OURS = "three plain rows", "DreamCache, three rows"
COMPILED = ", compiled"
LATENT = 16
"""Side of the demo model's latents."""


def node(name: str, **inputs: Any) -> tuple[Any, ...]:
    """Execute a node of the pack."""
    import nodes

    return nodes.NODE_CLASS_MAPPINGS[name].execute(**inputs).result


def make_parts() -> dict[str, Any]:
    """The demo model with its adapters, texts, and two references."""
    model, clip, vae, adapters = node("DreamCacheDemoModel")
    texts = [
        clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a mug", "mug", "")
    ]
    references = []
    for seed in (0, 1):
        image, _ = node("DreamCacheDemoReference", shape="mug", seed=seed)
        given = {"vae": vae, "image": image, "conditioning": texts[-1], "seed": 0, "timestep": 1}
        references.append(node("DreamCacheEncode", model=model, **given)[0])
    return {"model": model, "adapters": adapters, "texts": texts, "references": references}


def apply(model: Any, parts: dict[str, Any], index: int, scale: float) -> Any:
    """Put a reference on a MODEL, with three predictions a step."""
    return node(
        "DreamCacheApply",
        model=model,
        adapters=parts["adapters"],
        reference=parts["references"][index],
        scale=scale,
        image_guidance=3.0,
        start_percent=0.0,
        end_percent=1.0,
        guidance="separate",
    )[0]


def sampling(model: Any, texts: list[Any], steps: int, *, is_plain: bool) -> Callable[[], Any]:
    """A run of three rows a step: plain in DualCFGGuider, or of a MODEL with a reference in CFGGuider."""
    import comfy.samplers
    import torch
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    positive, _, negative = texts
    latent = torch.zeros(1, 4, LATENT, LATENT)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    schedule = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(schedule, "normal", steps)

    def sample() -> Any:
        guider = Guider_DualCFG(model) if is_plain else comfy.samplers.CFGGuider(model)
        guider.set_conds(*(texts if is_plain else (positive, negative)))
        guider.set_cfg(*((2.0, 1.5) if is_plain else (2.0,)))
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=0)

    return sample


def main() -> None:
    """Measure what the JSON on the command line asks for."""
    given = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as base:
        start_comfyui(given["comfyui"], base, given["device"])
        import comfy.cli_args

        # what ComfyUI takes on a GPU; its attention for CPUs asks for free memory, which breaks every graph
        comfy.cli_args.args.use_pytorch_cross_attention = True
        import torch
        from comfy_extras.nodes_torch_compile import TorchCompileModel
        from torch._dynamo.utils import counters

        from ..timing import alternate, processor_time

        load_pack()
        with torch.inference_mode():
            parts, runs = make_parts(), {}
            compiled = TorchCompileModel.execute(parts["model"], backend=given["backend"]).result[0]
            for model, suffix in ((parts["model"], ""), (compiled, COMPILED)):
                ours = apply(model, parts, 0, 1.0)
                for patched, name in ((model, PLAIN), (ours, OURS)):
                    runs[name + suffix] = sampling(
                        patched, parts["texts"], given["steps"], is_plain=patched is model
                    )
            device = torch.device(given["device"])
            seconds = alternate(runs, given["rounds"], device, processor_time)
            graphs = counters["stats"]["unique_graphs"]
            other = apply(compiled, parts, 1, 0.7)
            sampling(other, parts["texts"], given["steps"], is_plain=False)()
            results = {
                "seconds": seconds,
                "graphs": graphs,
                "more_graphs": counters["stats"]["unique_graphs"] - graphs,
                "torch": torch.__version__,
            }
    print(f"\n{json.dumps(results)}")


if __name__ == "__main__":
    main()
