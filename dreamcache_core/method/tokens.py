"""Which tokens of a reference are attended to: all of them, or its subject's and averages of the background."""

import torch
from torch import Tensor

from ..errors import InputError
from ..images.reference import resize_mask

BACKGROUND_GROUP = 16
"""Tokens of the background that are averaged into one where the subject is marked.

Not none of them: adapters are trained on whole images, where all of an image that is not the subject looks at the white
around it. Without anything to look at there, colours of the subject spill over the scene.
"""


def subject_tokens(mask: Tensor, height: int, width: int) -> Tensor:
    """Decide which tokens of a layer show the subject.

    A token counts when at least half of its area does; a subject too thin for that keeps its fullest token.

    Args:
        mask: (references, height, width) of the image, in [0, 1], 1 = subject.
        height: Rows of tokens.
        width: Columns of tokens.

    Returns:
        Bool, (references, height, width) of the layer, on the CPU; at least one token per reference.

    Raises:
        InputError: A mask is empty.
    """
    cover = resize_mask(mask.float().cpu(), height, width)
    fullest = cover.flatten(1).amax(dim=1)[:, None, None]
    if not bool((fullest > 0).all()):
        raise InputError(
            "The mask of a reference is empty: it must mark the subject with 1. Paint it or leave it out."
        )
    return cover >= fullest.clamp(max=0.5)


def keep_tokens(tokens: Tensor, is_subject: Tensor) -> Tensor:
    """Keep the subject's tokens, and average the others in groups.

    Args:
        tokens: Of one reference at one layer, row-major, (tokens, channels).
        is_subject: Bool, (tokens,).

    Returns:
        The subject's tokens, then the averages, (kept, channels).
    """
    groups = tokens[~is_subject].split(BACKGROUND_GROUP)
    averages = [group.mean(dim=0, keepdim=True) for group in groups if len(group)]
    return torch.cat([tokens[is_subject], *averages])


def spread_shares(shares: Tensor, is_subject: Tensor) -> Tensor:
    """Undo ``keep_tokens`` for what was divided among the kept tokens.

    Args:
        shares: (..., kept).
        is_subject: As ``keep_tokens`` took it.

    Returns:
        (..., tokens), of the same sum; the tokens of a group have equal parts of its share.
    """
    subject = int(is_subject.sum())
    group = torch.arange(len(is_subject) - subject, device=shares.device) // BACKGROUND_GROUP
    sizes = group.bincount()
    spread = shares.new_zeros(*shares.shape[:-1], len(is_subject))
    spread[..., is_subject] = shares[..., :subject]
    spread[..., ~is_subject] = (shares[..., subject:] / sizes)[..., group]
    return spread


def num_kept(is_subject: Tensor) -> int:
    """How many tokens ``keep_tokens`` returns."""
    subject = int(is_subject.sum())
    return subject - (subject - len(is_subject)) // BACKGROUND_GROUP
