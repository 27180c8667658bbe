"""Which ComfyUI the pack needs; refuses an older one in words before a module of it is missed somewhere."""

import re

OLDEST = (0, 3, 64)


def require_comfyui(version: str) -> None:
    """Refuse a ComfyUI that is too old.

    Args:
        version: Its version, ``0.3.64`` or ``v0.8.0-dev`` say; what has no numbers is let through.

    Raises:
        ImportError: It is older than ``OLDEST``.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if numbers and numbers < OLDEST:
        raise ImportError(
            f"DreamCache needs ComfyUI {'.'.join(map(str, OLDEST))} or newer; this is {version}. Update ComfyUI."
        )


def require_this_comfyui() -> None:
    """Refuse the ComfyUI that is running if it is too old.

    Raises:
        ImportError: It is older than ``OLDEST``, or so old that it does not say its version.
    """
    try:
        from comfyui_version import __version__
    except ImportError:
        __version__ = "0.3"  # the file came with 0.3.13
    require_comfyui(__version__)
