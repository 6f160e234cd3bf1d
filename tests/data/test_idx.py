import gzip
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxopt_models import data


def idx(array, magic=None):
    magic = {1: 0x801, 3: 0x803}[array.ndim] if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@given(
    array=hnp.arrays(
        np.uint8, st.one_of(hnp.array_shapes(min_dims=d, max_dims=d, min_side=0) for d in (1, 3))
    ),
    gzipped=st.booleans(),
)
def test_reads_back_what_was_written(tmp_path_factory, array, gzipped):
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(idx(array)) if gzipped else idx(array))
    read = data.read_idx(path)
    assert read.dtype == np.uint8
    assert not read.flags.writeable
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "starts with 0x,"),
        (b"\0\0\x08", "not an IDX file"),
        (idx(IMAGES, magic=0x802), "starts with 0x00000802, expected 0x00000803"),
        (idx(IMAGES)[:10], "truncated inside its header of 16 bytes"),
        (idx(IMAGES)[:-1], r"shape \(2, 3, 4\) needs 24 bytes, 23 are there"),
        (idx(IMAGES) + b"\0", "trailing bytes after the 24"),
        (struct.pack(">4I", 0x803, 1 << 31, 1 << 31, 1 << 31), "more than 1073741824 bytes"),
    ],
)
@pytest.mark.parametrize("gzipped", [False, True])
def test_damaged_files_are_refused_by_name(tmp_path, content, says, gzipped):
    path = tmp_path / "damaged"
    path.write_bytes(gzip.compress(content) if gzipped else content)
    with pytest.raises(ValueError, match=says) as caught:
        data.read_idx(path)
    assert str(path) in str(caught.value)


def test_damaged_gzip_streams_are_refused(tmp_path):
    whole = gzip.compress(idx(IMAGES))
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # In the checksum.
    for content in (whole[:-9], bytes(flipped), whole[:2] + b"rubbish"):
        path = tmp_path / "images.gz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="gzip stream is damaged"):
            data.read_idx(path)
