"""Masks as ComfyUI hands them to a node."""

import logging

from torch import Tensor

from ...dreamcache_core.images.reference import is_placeholder_mask

logger = logging.getLogger(__name__)


def given_mask(mask: Tensor | None) -> Tensor | None:
    """Return a node's mask; ``None`` for Load Image's placeholder too."""
    if mask is None or not is_placeholder_mask(mask):
        return mask
    logger.info(
        "The mask is Load Image's placeholder for an image without alpha: it counts as no mask."
    )
    return None
