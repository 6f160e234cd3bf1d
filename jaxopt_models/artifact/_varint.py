"""Variable-length integers: seven bits a byte, lowest first, shortest form only."""

from __future__ import annotations

from ._errors import ArtifactError

# Nothing that is counted in a file needs more: nine bytes of seven bits.
_MOST_BYTES = 9


def write_varint(value: int) -> bytes:
    """Returns the shortest form of a non-negative integer below `2 ** 63`."""
    if not 0 <= value < 1 << 63:
        raise ValueError(f"value must be in [0, 2**63), got {value}")
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, start: int = 0) -> tuple[int, int]:
    """Returns the integer at ``start`` and the position after it.

    Raises:
      ArtifactError: if the bytes end inside it, or it is not in its shortest form.
    """
    value = 0
    for k in range(_MOST_BYTES):
        if start + k >= len(data):
            raise ArtifactError("a table ends inside a number")
        byte = data[start + k]
        value |= (byte & 0x7F) << 7 * k
        if byte < 0x80:
            if byte == 0 and k:
                raise ArtifactError("a number in a table is not in its shortest form")
            return value, start + k + 1
    raise ArtifactError("a number in a table has more than 63 bits")
