"""What ``run`` measures: ``python -m benchmarks.inside.run '{...}'``. Prints one line of JSON."""

import copy
import cProfile
import json
import pstats
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from .host import PACK, load_pack, loaded_core, start_comfyui
from .models import SMALLEST, SMALLEST_LATENT, make_adapters, make_model, make_vae, random_text

TEXT_SCALE, IMAGE_SCALE = 7.5, 0.4
READ_STEPS = (6, 10)
"""Steps of the runs whose reads are compared: what happens once a run cancels out."""

WATCHED_STEPS = 2
"""Steps of the runs whose predictions are counted."""

PLAIN, THREE = "plain graph", "three plain predictions (DualCFGGuider)"
OURS = f"DreamCache, image_guidance {IMAGE_SCALE}"
WITHOUT_THIRD, JOINT = "DreamCache, image_guidance 1", "DreamCache, guidance joint"
RANGED = "DreamCache in a part of the run, guidance in another"
TIMED = (PLAIN, WITHOUT_THIRD, OURS, JOINT, THREE)
ENCODE = "Encode Reference"

STEP_PLAIN, STEP_OURS = "one step, plain U-Net, three rows", "the same through the core"


def make_encode(model: Any, vae_width: int, latent: int) -> Callable[[], Any]:
    """The Encode Reference node on an image of noise -> what gives the reference."""
    import torch

    import nodes

    vae, text = make_vae(vae_width), random_text(model)
    image = torch.rand(1, 8 * latent, 8 * latent, 3)
    node = nodes.NODE_CLASS_MAPPINGS["DreamCacheEncode"]
    given = {"model": model, "vae": vae, "image": image, "conditioning": text}
    return lambda: node.execute(**given, seed=0, timestep=1).result[0]


def apply(model: Any, adapters: Any, reference: Any) -> dict[str, Any]:
    """MODELs by name: plain, and from the Apply node with each kind of guidance, and in ranges."""
    import nodes

    node = nodes.NODE_CLASS_MAPPINGS["DreamCacheApply"]
    limit = nodes.NODE_CLASS_MAPPINGS["DreamCacheGuidanceRange"]

    def applied(**changes: Any) -> Any:
        inputs = {
            "scale": 1.0,
            "image_guidance": IMAGE_SCALE,
            "start_percent": 0.0,
            "end_percent": 1.0,
            "guidance": "separate",
        }
        return node.execute(
            model=model, adapters=adapters, reference=reference, **{**inputs, **changes}
        ).result[0]

    within = applied(start_percent=0.05, end_percent=0.95)
    return {
        PLAIN: model,
        WITHOUT_THIRD: applied(image_guidance=1.0),
        OURS: applied(),
        JOINT: applied(guidance="joint"),
        RANGED: limit.execute(model=within, start_percent=0.25, end_percent=0.75).result[0],
    }


def make_models(size: dict[str, Any], latent: int) -> tuple[dict[str, Any], Any, Any]:
    """MODELs by name, their adapters, and what encodes the reference."""
    model = make_model(size)
    adapters = make_adapters(model)
    encode = make_encode(model, size["vae_width"], latent)
    return apply(model, adapters, encode()), adapters, encode


def make_runs(models: dict[str, Any], latent: int, steps: int) -> dict[str, Callable[[], Any]]:
    """Sampling runs by name: KSampler with each MODEL, and three plain predictions a step."""
    import comfy.sample
    import comfy.samplers
    import torch
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    model = models[PLAIN]
    positive, middle, negative = (random_text(model) for _ in range(3))
    empty = torch.zeros(1, 4, latent, latent)
    noise = comfy.sample.prepare_noise(empty, 0)
    sigmas = comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "normal", steps
    )

    def ksampler(patcher: Any) -> Any:
        return comfy.sample.sample(
            patcher,
            noise,
            steps,
            TEXT_SCALE,
            "euler",
            "normal",
            positive,
            negative,
            empty,
            disable_pbar=True,
            seed=0,
        )

    def dual() -> Any:
        guider = Guider_DualCFG(model)
        guider.set_conds(positive, middle, negative)
        guider.set_cfg(TEXT_SCALE, 1.5)
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, empty, sampler, sigmas, disable_pbar=True, seed=0)

    runs = {name: partial(ksampler, patcher) for name, patcher in models.items()}
    return {**runs, THREE: dual}


@contextmanager
def core_steps(
    model: Any, adapters: Any, reference: Any, latent: int
) -> Iterator[dict[str, Callable[[], Any]]]:
    """One call of ComfyUI's U-Net for three rows, plain and with the core's ``inject``, while the context is open."""
    import comfy.model_management
    import torch

    comfy.model_management.load_models_gpu([model])
    core, unet = loaded_core(), model.model.diffusion_model
    weight = next(unet.parameters())
    fused = adapters.fuse(dtype=weight.dtype).to(weight.device)
    shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    injected = copy.deepcopy(unet, memo=shared)  # the same weights, hooks of its own
    width = model.model.model_config.unet_config["context_dim"]
    latents, text = (
        torch.randn(3, 4, latent, latent).to(weight),
        torch.randn(3, 77, width).to(weight),
    )
    timesteps = torch.full((3,), 500.0, device=weight.device)
    with core.inject(injected, core.ReferenceUse(reference, fused), rows=[False, True, True]):
        yield {
            STEP_PLAIN: lambda: unet(latents, timesteps, context=text),
            STEP_OURS: lambda: injected(latents, timesteps, context=text),
        }


def watch_run(model: Any, action: Callable[[], Any]) -> dict[str, int]:
    """Count the rows that a run gives to the U-Net, and the values that DreamCache holds at its end."""
    from unittest.mock import patch

    store = sys.modules[
        loaded_core().__name__.replace("dreamcache_core", "nodes.host.run")
    ].RunStore
    counts, clear = {"rows": 0, "adapters": 0, "keys_values": 0}, store.clear

    def count_rows(_: Any, inputs: Any) -> None:
        counts["rows"] += len(inputs[0])

    def count_held(self: Any) -> None:
        layers = [layer for use in self.prepared.values() for layer in use.values()]
        counts["keys_values"] += sum(e.key.numel() + e.value.numel() for e in layers)
        weights = [w for adapters in self.applied.patchers for w in adapters.model.parameters()]
        counts["adapters"] += sum(weight.numel() for weight in weights)
        clear(self)

    hook = model.model.diffusion_model.register_forward_pre_hook(count_rows)
    try:
        with patch.object(store, "clear", count_held):
            action()
    finally:
        hook.remove()
    return counts


def peak_bytes(action: Callable[[], Any]) -> int:
    """Most bytes that torch's allocator gives out on the GPU during a run that loads all of its models."""
    import comfy.model_management
    import torch

    comfy.model_management.unload_all_models()
    torch.cuda.reset_peak_memory_stats()
    action()
    return torch.cuda.max_memory_allocated()


def own_python_seconds(action: Callable[[], Any]) -> float:
    """Seconds that a run spends in the pack's own lines, what they call in torch and ComfyUI left out.

    A profile counts arithmetic written with operators as the line's own: give a run on tensors too small to matter.
    """
    profile = cProfile.Profile()
    profile.runcall(action)
    stats: Any = pstats.Stats(profile)
    own = (entry for (file, *_), entry in stats.stats.items() if file.startswith(str(PACK)))
    return sum(total for _, _, total, *_ in own)


def count_reads(action: Callable[[], Any]) -> int:
    """Times that a run reads numbers back from tensors, for which a GPU would have to finish first.

    Whole numbers are left out: the marks of rows are such, and lie in main memory whatever computes.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    names = (
        "__bool__",
        "__float__",
        "__int__",
        "cpu",
        "equal",
        "item",
        "nonzero",
        "numpy",
        "tolist",
    )
    waiting = {getattr(torch.Tensor, name) for name in names} | {torch.equal, torch.nonzero}
    count = 0

    class Reads(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal count
            count += func in waiting and args[0].is_floating_point()
            return func(*args, **(kwargs or {}))

    with Reads():
        action()
    return count


def reads_by_name(models: dict[str, Any], steps: int) -> dict[str, int]:
    """Reads of the runs that are compared in them."""
    runs = make_runs(models, SMALLEST_LATENT, steps)
    return {name: count_reads(runs[name]) for name in (PLAIN, OURS, RANGED)}


def main() -> None:
    """Measure what the JSON on the command line asks for."""
    given = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as base:
        start_comfyui(given["comfyui"], base, given["device"])
        import torch

        from ..timing import alternate, processor_time

        loading, device = load_pack(), torch.device(given["device"])
        torch.manual_seed(0)
        with torch.inference_mode():
            latent, rounds = given["latent"], given["rounds"]
            models, adapters, encode = make_models(given["size"], latent)
            model, reference = models[PLAIN], encode()
            runs = make_runs(models, latent, given["steps"])
            timed = {name: runs[name] for name in TIMED}
            seconds = alternate({**timed, ENCODE: encode}, rounds, device, processor_time)
            with core_steps(model, adapters, reference, latent) as steps:
                step_seconds = alternate(steps, rounds, device, processor_time)
            on_gpu = device.type != "cpu"
            peaks = {name: peak_bytes(action) for name, action in timed.items()} if on_gpu else {}
            watched = make_runs(models, SMALLEST_LATENT, WATCHED_STEPS)
            smallest, *_ = make_models(SMALLEST, SMALLEST_LATENT)
            quick = make_runs(smallest, SMALLEST_LATENT, given["steps"])[OURS]
            quick()
            results = {
                "seconds": seconds,
                "step_seconds": step_seconds,
                "peak_bytes": peaks,
                "watched": {name: watch_run(model, watched[name]) for name in TIMED},
                "cached_values": sum(maps.numel() for maps in reference.features.values()),
                "own_python_s": [own_python_seconds(quick) for _ in range(rounds)],
                "reads": {str(count): reads_by_name(smallest, count) for count in READ_STEPS},
                "loading_s": loading,
                "dtype": str(model.model.diffusion_model.dtype).removeprefix("torch."),
                "torch": torch.__version__,
            }
    print(f"\n{json.dumps(results)}")


if __name__ == "__main__":
    main()
