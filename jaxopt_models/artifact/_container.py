"""The container: sections one after another, then an index that says what they are.

.. code-block:: text

    magic      "jom" and the version of the format                      4 bytes
    sections   what the layer above wrote, back to back
    index      raw deflate of msgpack [meta, [[length, crc32, description], ...]],
               with the preset dictionary below
    trailer    length of the index, crc32 of magic and index            4 + 4 bytes

All numbers outside msgpack are little-endian. The index comes last, so that a writer
needs the memory of one section only; a reader needs the end of the file only to know
everything in it. The lengths sum to the size of the file, so no byte is unaccounted for.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from ._errors import brief

NAME = b"jom"
VERSION = 1
MAGIC = NAME + bytes([VERSION])
TRAILER = struct.Struct("<II")
# What an index usually says, so that short ones need not say it again; most usual last.
# Part of the format: another dictionary needs another version.
DICTIONARY = b"".join(
    [
        b"codebookvocabularyattentionselfquerykeyvalueoutputdensedowngateupprojlayers"
        b"encoderdecoderblockembeddingwte_ema_runningvarmeanbatch_statsnormscaleweight"
        b"\xa6uint32\xacthreefry2x32\xa4int8\x94\x92\xa50.1.0\xc0",
        b'"axes":{"Axes":{"stack":1,"out":[0]}}prune.NofM"n":2,"m":4prune.Block"rows":"columns":'
        b'"symmetric":false"group":128"start":"density""across_stack":true"structure":{"per":'
        b'"channel"[{"path":".*","encoder":null}},{"path":".*/embedding","encoder":{"quant.Int":'
        b'{"bits":8,"per":"tensor"}}}]\x92\x94\xa50.1.0\xda\x01',
        b'[{"path":"Dense_0/kernel","encoder":{"quant.Int":{"bits":4}}},{"path":".*/bias","encoder"'
        b':{"quant.Int":{"bits":8,"per":"tensor"}}},{"path":"ip1/kernel","encoder":[{"prune.Magnitude"'
        b':{"sparsity":0.95}},{"codebook.KMeans":{"bits":4}}]},{"path":".*/kernel","encoder":['
        b'{"prune.Magnitude":{"sparsity":0.9}},{"codebook.KMeans":{"bits":5}}]}]',
        b"\xa6params\x83\xa3ip1\x82\xa4bias\x00\xa6kernel\x00\xa3ip2\x82\xa4bias\x00\xa6kernel\x00"
        b"\xa3ip3\x82\xa4bias\x00\xa6kernel\x00\xce\x00\x84\xa5conv1\x82\xa4bias\x00\xa6kernel\x00"
        b"\xa5conv2\x82\xa4bias\x00\xa6kernel\x00\xa3ip1\xa7Dense_0\x82\xa4bias\x00\xa6kernel\x00"
        b"\xa7Dense_1\x82\xa4bias\x00\xa6kernel\x00",
        b"\x94\x00\xa8bfloat16\x91\xcd\x94\x00\xa7float32\x92\x10\x10\xa7float32\x93\x40\xc4\x04"
        b"\x94\x00\xa7float32\x91\x10\xa7float32\x93\xcd",
        b"\x93\xa9Quantized\x94\x92\xcd\x10\x00\xcd\x10\x00\x91\x01\x04\xa7float32\x93\x95\x03\x90"
        b"\x03\x03\xcd\x94\x00\xa7float32\x92\xcd\xc4\x04",
        b"\x93\xa9Quantized\x94\x91\xcd\x01\x2c\x90\x08\xa7float32\x93\x95\x03\x90\x03\x03\xcd"
        b"\x94\x00\xa7float32\x91\x01\xa7float32\xc0\x93\xcd\xc4\x04",
        b"\x93\xa9Quantized\x94\x91\x0a\x90\x08\xa7float32\x93\x95\x03\x90\x01\x00\x0a"
        b"\x94\x00\xa7float32\x91\x01\xa7float32\xc0\x93\xcd\xc4\x04",
        b"\x93\xa6Masked\x91\x92\xcd\x03\x10\xcd\x01\x2c\x92\x95\x02\x90\x02\x07\xcd"
        b"\x93\xa9Clustered\x94\x92\xcd\x03\x10\xcd\x01\x2c\x90\x04\xa7float32\x92\x95\x03\x90\x03"
        b"\x01\xcd\x94\x00\xa7float32\x91\x10\xa7float32\x93\xcd\xc4\x04",
        b"\x93\xa6Masked\x91\x92\x64\x0a\x92\x95\x02\x90\x03\x07\xcd"
        b"\x93\xa9Clustered\x94\x92\x64\x0a\x90\x05\xa7float32\x92\x95\x03\x90\x03"
        b"\x03\xcd\x94\x00\xa7float32\x91\x20\xa7float32\x93\xcd\xc4\x04",
    ]
)
MOST_INDEX = 64 << 20
_MOST_INT = 1 << 63


def most_inflated(compressed: int) -> int:
    """Returns the bytes that an index of so many compressed bytes may have.

    Deflate reaches 1032 to 1, and a byte of msgpack may become an object of 56 bytes; a
    writer stores an index that would shrink further as it is.
    """
    return min(MOST_INDEX, 64 * compressed + (4 << 10))


def check_plain(tree: Any) -> None:
    """Refuses what a file must not hold; without recursion, whatever the depth."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if node is None or type(node) in (bool, str, bytes):
            continue
        if type(node) is int:
            if not -_MOST_INT <= node < _MOST_INT:
                raise ValueError(f"{node} has more than 64 bits")
        elif type(node) is float:
            if not math.isfinite(node):
                raise ValueError(f"{node} is not finite")
        elif type(node) in (list, tuple):
            stack.extend(node)
        elif type(node) is dict:
            bad = [key for key in node if type(key) is not str]
            if bad:
                raise TypeError(f"keys must be strings, got {brief(bad[0])}")
            stack.extend(node.values())
        else:
            raise TypeError(f"a file cannot hold {type(node).__name__} {brief(node)}")
