"""A guider with an image guidance of its own."""

from typing import Any

import comfy.samplers

from ...dreamcache_core import Guidance
from .applied import require_applied

UNCONDITIONAL = "dreamcache_unconditional"


class DreamCacheCFGGuider(comfy.samplers.CFGGuider):
    """CFG with METHOD.md's three-term rule; the wrappers on the MODEL do the work."""

    def set_dreamcache(
        self, positive: Any, negative: Any, unconditional: Any, image_guidance_scale: float
    ) -> None:
        """Set the conditionings and the image guidance.

        Args:
            positive: Prompt, with the reference.
            negative: Negative text, with the reference.
            unconditional: Text of the prediction without reference, or ``None`` for the negative.
            image_guidance_scale: s_image of METHOD.md section 5.

        Raises:
            StateError: There is no reference on the MODEL.
        """
        conds = {"positive": positive, "negative": negative}
        if unconditional is not None:
            # the key is not one that ComfyUI knows, so the prompt type has to be said
            conds[UNCONDITIONAL] = [
                [text, {**options, "prompt_type": "negative"}] for text, options in unconditional
            ]
        self.inner_set_conds(conds)
        image_range = require_applied(self.model_patcher, "DreamCache Guider").guidance.image_range
        self.guidance = Guidance(image_guidance_scale, "separate", image_range)
