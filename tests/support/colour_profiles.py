"""ICC profiles written by hand: wide gamuts, grey of another gamma, and an ink set."""

import struct

D50 = (0.9642, 1.0, 0.8249)


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(value * 256))


def _profile(kind: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = b"a profile\0"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(80)
    tags = {b"desc": described.ljust(104, b"\0"), b"wtpt": _xyz(*D50), **tags}
    start, index, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        index += name + struct.pack(">II", start + len(body), len(value))
        body += value.ljust(-(-len(value) // 4) * 4, b"\0")
    head = struct.pack(
        ">I4xI4s4s4s12x4s24xI12s48x",
        start + len(body),
        0x02400000,
        kind,
        space,
        pcs,
        b"acsp",
        0,
        _xyz(*D50)[8:],
    )
    return head + index + body


def _wide(gamma: float, **primaries: tuple[float, float, float]) -> bytes:
    tags = {f"{colour}XYZ".encode(): _xyz(*values) for colour, values in primaries.items()}
    tags |= {f"{colour}TRC".encode(): _gamma(gamma) for colour in "rgb"}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def _inks() -> bytes:
    """Four inks that give each combination a colour of its own: cyan is printed as what looks orange."""
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    grid = bytearray()
    for inks in range(16):  # the last ink changes fastest; 8 bits of L*, a* + 128, b* + 128
        paper, cyan = inks == 0, inks == 8
        grid += bytes((255, 128, 128) if paper else (166, 168, 183) if cyan else (20, 128, 128))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + ramp * 4 + grid + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})


ADOBE_RGB = _wide(
    2.2, r=(0.60974, 0.31111, 0.01947), g=(0.20528, 0.62567, 0.06087), b=(0.14919, 0.06322, 0.74457)
)
DISPLAY_P3 = _wide(
    2.2, r=(0.51512, 0.2412, -0.00105), g=(0.29198, 0.69225, 0.04189), b=(0.1571, 0.06657, 0.78407)
)
LINEAR_GREY = _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _gamma(1.0)})
ODD_INKS = _inks()
