"""What ``run`` measures inside ComfyUI; executed by ComfyUI's interpreter, as ``python inside_comfyui.py '{...}'``.

Prints one line of JSON. Besides ComfyUI and the pack it imports nothing that ComfyUI lacks.
"""

import asyncio
import copy
import cProfile
import json
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACK = Path(__file__).parents[1]
TEXT_SCALE, IMAGE_SCALE = 7.5, 0.4
READ_STEPS = (6, 10)
"""Steps of the runs whose reads are compared: what happens once a run cancels out."""

SMALLEST_LATENT = 8
"""Side of the latents whose arithmetic takes no time beside the Python that asks for it."""

PLAIN, THREE, OURS = "plain guidance, two rows", "DualCFGGuider, three rows", "DreamCache"
RANGED = "DreamCache in a part of the run, guidance in another"
TIMED = (PLAIN, THREE, OURS)

STEP_PLAIN, STEP_OURS = "one step, plain U-Net, three rows", "the same through the core"


def start_comfyui(folder: str, base: str, device: str) -> None:
    """Put ComfyUI first on the path and let it read its command line, as ``main.py`` does."""
    sys.path.insert(0, folder)
    sys.argv = ["main.py", "--base-directory", base, *(["--cpu"] if device == "cpu" else [])]
    import comfy.options

    comfy.options.enable_args_parsing()
    for name in ("input", "output", "temp", "models", "custom_nodes", "user"):
        Path(base, name).mkdir()


def load_pack() -> float:
    """Load the pack as ComfyUI does -> seconds, less what ComfyUI imports for whichever pack comes first."""
    import comfy_config.config_parser  # noqa: F401

    import nodes

    began = time.perf_counter()
    if not asyncio.run(nodes.load_custom_node(str(PACK))):
        raise SystemExit("ComfyUI could not load the pack.")
    return time.perf_counter() - began


def make_model(widths: list[int], heads: list[int], text_width: int) -> Any:
    """A MODEL of Stable Diffusion 2's structure with random weights."""
    import comfy.model_management
    import comfy.supported_models
    import torch
    from comfy.model_patcher import ModelPatcher

    class Config(comfy.supported_models.SD20):
        unet_extra_config = {  # noqa: RUF012
            "num_heads": -1,
            "num_head_channels": widths[0] // heads[0],
            "attn_precision": torch.float32,
        }

        def model_type(self, state_dict: Any, prefix: str = "") -> Any:  # noqa: ARG002
            return comfy.model_base.ModelType.EPS

    config = Config(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": widths[0],
            "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [width // widths[0] for width in widths],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            "use_spatial_transformer": True,
            "use_linear_in_transformer": True,
            "context_dim": text_width,
            "legacy": False,
            "adm_in_channels": None,
            "use_temporal_attention": False,
            "use_temporal_resblock": False,
        }
    )
    device = comfy.model_management.get_torch_device()
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=torch.device("cpu"))
    with torch.no_grad():
        for weight in model.diffusion_model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
            else:
                weight.zero_()
    return ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def loaded_core() -> Any:
    """The core as the pack has loaded it."""
    return next(module for name, module in sys.modules.items() if name.endswith(".dreamcache_core"))


def make_reference(model: Any, latent: int) -> tuple[Any, Any]:
    """Random adapters, and the model's own features of noise."""
    import torch

    core, unet = loaded_core(), model.model.diffusion_model
    with torch.inference_mode(False), torch.no_grad():
        adapters = core.AdapterSet(
            core.AdapterInfo(sys.modules[f"{core.__name__}.method.backends"].layout_of(unet))
        )
        text = torch.randn(1, 77, model.model.model_config.unet_config["context_dim"])
        noised = torch.randn(1, 4, latent, latent)
        weight = next(unet.parameters())
        reference = core.capture_reference(unet, noised.to(weight.dtype), 1, text.to(weight.dtype))
        for layer in adapters.layers:
            torch.nn.init.normal_(adapters[layer].merge.weight, std=0.02)
    return adapters, reference


def apply(model: Any, adapters: Any, reference: Any) -> tuple[Any, Any]:
    """Run the Apply node: always on, and in ranges."""
    import nodes

    node = nodes.NODE_CLASS_MAPPINGS["DreamCacheApply"]
    limit = nodes.NODE_CLASS_MAPPINGS["DreamCacheGuidanceRange"]

    def applied(start_percent: float, end_percent: float) -> Any:
        return node.execute(
            model=model,
            adapters=adapters,
            reference=reference,
            scale=1.0,
            image_guidance=IMAGE_SCALE,
            start_percent=start_percent,
            end_percent=end_percent,
            guidance="separate",
        ).result[0]

    in_ranges = limit.execute(model=applied(0.05, 0.95), start_percent=0.25, end_percent=0.75)
    return applied(0.0, 1.0), in_ranges.result[0]


def make_runs(
    model: Any, applied: Any, ranged: Any, latent: int, steps: int
) -> dict[str, Callable[[], Any]]:
    """Sampling runs by name: KSampler plain, with DreamCache and with it in ranges; three plain predictions a step."""
    import comfy.sample
    import comfy.samplers
    import torch
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    width = model.model.model_config.unet_config["context_dim"]
    positive, middle, negative = (
        [[torch.randn(1, 77, width), {"pooled_output": None}]] for _ in range(3)
    )
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

    return {
        PLAIN: lambda: ksampler(model),
        THREE: dual,
        OURS: lambda: ksampler(applied),
        RANGED: lambda: ksampler(ranged),
    }


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


def time_runs(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time runs in turn, after one of each."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for action in runs.values():
        action()
    for _ in range(rounds):
        for name, action in runs.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


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


def main() -> None:
    """Measure what the JSON on the command line asks for."""
    given = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as base:
        start_comfyui(given["comfyui"], base, given["device"])
        import torch

        import nodes  # noqa: F401

        loading = load_pack()
        torch.manual_seed(0)
        with torch.inference_mode():
            model = make_model(given["widths"], given["heads"], given["text_width"])
            adapters, reference = make_reference(model, given["latent"])
            models = (model, *apply(model, adapters, reference))
            runs = make_runs(*models, given["latent"], given["steps"])
            seconds = time_runs({name: runs[name] for name in TIMED}, given["rounds"])
            with core_steps(model, adapters, reference, given["latent"]) as steps:
                step_seconds = time_runs(steps, given["rounds"])
            small = make_runs(*models, SMALLEST_LATENT, given["steps"])[OURS]
            small()
            results = {
                "seconds": seconds,
                "step_seconds": step_seconds,
                "own_python_s": [own_python_seconds(small) for _ in range(given["rounds"])],
                "reads": {
                    str(count): {
                        name: count_reads(action)
                        for name, action in make_runs(*models, given["latent"], count).items()
                    }
                    for count in READ_STEPS
                },
                "loading_s": loading,
                "torch": torch.__version__,
            }
    print(f"\n{json.dumps(results)}")


if __name__ == "__main__":
    main()
