"""Training as METHOD.md sections 3, 4 and 7 read, in the obvious lines: what the product is measured against.

Nothing here comes from ``dreamcache_core``, so that agreement in value means something.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CACHED_LAYERS = {
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.1.attentions.1": "output_blocks.4.1",
    "up_blocks.2.attentions.0": "output_blocks.6.1",
    "up_blocks.2.attentions.2": "output_blocks.8.1",
    "up_blocks.3.attentions.1": "output_blocks.10.1",
}
"""METHOD.md section 2 for Stable Diffusion 1 and 2: diffusers' name, ldm's."""


class TextbookAdapter(nn.Module):
    """The adapter of METHOD.md section 4, with its names.

    Args:
        channels: Width d of the layer.
        heads: Number of heads of the block's self-attention.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm2_mem = nn.LayerNorm(channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        self.linear_cat = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor, self_attention: Tensor, r: Tensor) -> Tensor:
        """Compute ``linear_cat(concat([self, ref]))``; all (batch, tokens, channels)."""
        q, k, v = self.to_q(self.norm2_mem(x)), self.to_k(r), self.to_v(r)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        ref = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.linear_cat(torch.cat([self_attention, ref], dim=-1))


class TextbookLoop:
    """The plain loop: at each step everything is encoded, and both passes of the U-Net are complete.

    Args:
        pipeline: A diffusers ``StableDiffusionPipeline`` that predicts noise, frozen, on its device.
        dtype: Float type that the U-Net computes in.
        learning_rate: Of AdamW; its other settings are torch's own.
    """

    def __init__(self, pipeline: Any, dtype: torch.dtype, learning_rate: float = 1e-5) -> None:
        self.pipeline, self.unet, self.dtype = pipeline, pipeline.unet, dtype
        self.device = pipeline.unet.device
        self.alphas = pipeline.scheduler.alphas_cumprod.to(self.device)
        self.adapters = nn.ModuleList(self._adapter(name) for name in CACHED_LAYERS).to(self.device)
        self.optimizer = torch.optim.AdamW(self.adapters.parameters(), lr=learning_rate)

    def _adapter(self, name: str) -> TextbookAdapter:
        block = self.unet.get_submodule(name).transformer_blocks[0]
        return TextbookAdapter(block.attn1.inner_dim, block.attn1.heads)

    def step(self, batch: Mapping[str, Any]) -> None:
        """Train on a batch of images; see ``loss``."""
        self.backward(self.loss(batch))
        nn.utils.clip_grad_norm_(self.adapters.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean squared error of the noise.

        Args:
            batch: ``target`` and ``reference`` (batch, height, width, 3) in [0, 1]; ``caption``: texts, and
                ``is_dropped``: which of them count as empty; ``timestep`` (batch,); ``noise`` and ``reference_noise``
                in the latents' shape.

        Returns:
            A scalar.
        """
        noise, timesteps = batch["noise"], batch["timestep"]
        dropped = batch["is_dropped"].tolist()
        captions = ["" if drop else c for c, drop in zip(batch["caption"], dropped, strict=True)]
        target, reference = (self.encode_images(batch[k]) for k in ("target", "reference"))
        states = self.encode_text([*captions, ""])
        empty = states[-1:].expand(len(target), -1, -1)
        first = torch.ones_like(timesteps)
        features = self.capture(
            self.add_noise(reference, batch["reference_noise"], first), first, empty
        )
        noised = self.add_noise(target, noise, timesteps).to(self.unet.dtype)
        with self.injected(features), self.autocast():
            predicted = self.unet(noised, timesteps, states[:-1]).sample
        return F.mse_loss(predicted.float(), noise)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        loss.backward()

    def autocast(self) -> Any:
        """Return a context that computes in the wanted float type."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def add_noise(self, latent: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``sqrt(abar) * z + sqrt(1 - abar) * noise``."""
        alpha = self.alphas[timesteps][:, None, None, None]
        return alpha.sqrt() * latent + (1 - alpha).sqrt() * noise

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """(batch, height, width, 3) in [0, 1] -> scaled latents, float32."""
        vae = self.pipeline.vae
        pixels = (images.permute(0, 3, 1, 2) * 2 - 1).to(vae.dtype)
        return (vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor).float()

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Texts -> (texts, tokens, width)."""
        tokenizer = self.pipeline.tokenizer
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = tokenizer(list(captions), max_length=tokenizer.model_max_length, **options).input_ids
        return self.pipeline.text_encoder(ids.to(self.device))[0]

    @torch.no_grad()
    def capture(self, noised: Tensor, timesteps: Tensor, empty: Tensor) -> list[Tensor]:
        """Run the whole U-Net on the references and note what enters the cached layers, as tokens."""
        features: list[Tensor] = []
        hooks = [
            self.unet.get_submodule(name).register_forward_pre_hook(
                lambda _, args: features.append(args[0].flatten(2).transpose(1, 2))
            )
            for name in CACHED_LAYERS
        ]
        self.unet(noised.to(self.unet.dtype), timesteps, empty)
        for hook in hooks:
            hook.remove()
        return features

    @contextmanager
    def injected(self, features: Sequence[Tensor]) -> Iterator[None]:
        """Put the adapters into the U-Net while the context is open."""
        with ExitStack() as stack:
            for name, adapter, r in zip(CACHED_LAYERS, self.adapters, features, strict=True):
                block = self.unet.get_submodule(name).transformer_blocks[0]
                stack.enter_context(in_place_of_self_attention(block, adapter, r))
            yield


@contextmanager
def in_place_of_self_attention(block: Any, adapter: nn.Module, r: Tensor) -> Iterator[None]:
    """Add an adapter's result to a block's hidden states while the context is open.

    Args:
        block: diffusers' transformer block.
        adapter: Takes hidden states, self-attention output and ``r``.
        r: The reference's tokens, (batch, reference_tokens, channels).
    """
    entering: list[Tensor] = []
    before = block.norm1.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    after = block.attn1.register_forward_hook(
        lambda _, __, output: adapter(entering.pop(), output, r)
    )
    with before, after:  # hooks are removed when their context ends
        yield
