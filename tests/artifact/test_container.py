"""The container: all or nothing when written, nothing believed when read."""

import os
import signal
import struct
import subprocess
import sys
import time
import zlib

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_models.artifact import ArtifactError, Reader, Writer

MAGIC = b"jom\x01"
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(max_size=4), s, max_size=4),
    max_leaves=12,
)


def write(path, sections, meta):
    with Writer(path) as writer:
        for description, chunks in sections:
            writer.add(description, chunks)
        writer.close(meta)
    return path.read_bytes()


def forge(tree, body=b"", magic=MAGIC, plain=None):
    """A file with right checksums and any index."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    plain = msgpack.packb(tree) if plain is None else plain
    index = deflate.compress(plain) + deflate.flush()
    return seal(body, index, magic)


def seal(body, index, magic=MAGIC):
    return magic + body + index + struct.pack("<II", len(index), zlib.crc32(magic + index))


def crc(data):
    return zlib.crc32(data).to_bytes(4, "little")


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "small.jom", [(["a", [2]], [b"xy", b"z"]), (["b"], [])], {"v": 1})


@given(st.lists(st.tuples(st.lists(PLAIN, max_size=3), st.lists(st.binary(), max_size=3))), PLAIN)
@settings(deadline=None, max_examples=25)
def test_round_trip(tmp_path_factory, sections, meta):
    path = tmp_path_factory.mktemp("container") / "model.jom"
    data = write(path, sections, meta)
    for source in (path, str(path), data):
        with Reader(source) as reader:
            assert reader.meta == meta
            assert [s.description for s in reader.sections] == [s for s, _ in sections]
            for i, (_, chunks) in enumerate(sections):
                assert reader.read(i) == b"".join(chunks)
            assert reader.size == len(data) == sum(reader.parts().values())
            assert sum(s.length for s in reader.sections) == reader.parts()["sections"]
    assert os.listdir(path.parent) == ["model.jom"]


def test_overhead_is_lean(tmp_path):
    """LeNet-300-100: at most 160 bytes and 24 for each of 6 tensors."""
    sections = []
    rng = np.random.default_rng(0)
    for i, (a, b) in enumerate([(784, 300), (300, 100), (100, 10)]):
        kernel = rng.integers(0, 256, 9000 // (i + 1), np.uint8).tobytes()
        lengths = [7 + i, 4000 - i, 3, len(kernel) - 4010]
        sections.append(([f"params/Dense_{i}/kernel", [a, b], "float32", lengths], [kernel]))
        sections.append(([f"params/Dense_{i}/bias", [b], "float32", [4 * b]], [bytes(4 * b)]))
    meta = {"recipe": [[".*/kernel", "Magnitude", {"sparsity": 0.937}]], "jaxopt_models": "0.1.0"}
    write(tmp_path / "lenet.jom", sections, meta)
    with Reader(tmp_path / "lenet.jom") as reader:
        parts = reader.parts()
    assert parts["magic"] + parts["index"] + parts["trailer"] <= 160 + 24 * 6


def test_read_touches_one_section_only(tmp_path):
    path = tmp_path / "model.jom"
    data = bytearray(write(path, [(["a"], [bytes(100)]), (["b"], [b"good"])], None))
    data[50] ^= 1
    path.write_bytes(data)
    with Reader(path) as reader:
        assert reader.read(1) == b"good"
        with pytest.raises(ArtifactError, match=r"section 0 \['a'\] is damaged"):
            reader.read(0)


def test_truncation_at_every_byte_is_refused(small):
    for n in range(len(small)):
        with pytest.raises(ArtifactError):
            Reader(small[:n])
        with pytest.raises(ArtifactError):
            Reader(small[n + 1 :])


def test_every_flipped_bit_is_refused(small):
    for k in range(8 * len(small)):
        data = bytearray(small)
        data[k // 8] ^= 1 << k % 8
        with pytest.raises(ArtifactError), Reader(bytes(data)) as reader:
            for i in range(len(reader.sections)):
                reader.read(i)


def test_appended_bytes_are_refused(small):
    for tail in (b"\0", bytes(8), small[-8:], small):
        with pytest.raises(ArtifactError):
            Reader(small + tail)


@given(st.binary(max_size=80))
@settings(deadline=None, max_examples=300)
def test_a_garbage_index_never_raises_anything_else(plain):
    for data in (forge(None, plain=plain), seal(b"", plain), MAGIC + plain):
        with pytest.raises(ArtifactError):
            Reader(data)


ONE = [3, crc(b"abc"), ["a"]]


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "no jaxopt_models artifact"),
        (b"PK\3\4" + bytes(40), "no jaxopt_models artifact"),
        (b"jom", "magic number"),
        (forge([{}, []], magic=b"jom\x02"), "version 2, .* reads version 1: upgrade"),
        (forge([{}, []], magic=b"jom\x00"), "version 0, .* write the file again"),
        (MAGIC + bytes(7), "ends early"),
        (MAGIC + struct.pack("<II", 2**32 - 1, 0), "index of 4294967295 bytes"),
        (MAGIC + struct.pack("<II", 0, 0), "index of 0 bytes"),
        (seal(b"", b"\xff\xff"), "index is damaged"),
        (seal(b"", zlib.compress(msgpack.packb([{}, []]))), "index is damaged"),
        (forge([{}]), "no pair"),
        (forge({"a": 1}), "no pair"),
        (forge([{}, {}]), "no pair"),
        (forge([{}, [ONE]], b"ab"), "sections have 3 bytes, the file has 2"),
        (forge([{}, [ONE]], b"abcd"), "sections have 3 bytes, the file has 4"),
        (forge([{}, [[True, crc(b"a"), []]]], b"a"), "section 0"),
        (forge([{}, [[-1, crc(b""), []], [1, crc(b""), []]]]), "section 0"),
        (forge([{}, [[1.0, crc(b"a"), []]]], b"a"), "section 0"),
        (forge([{}, [[1, b"abc", []]]], b"a"), "section 0"),
        (forge([{}, [[1, "abcd", []]]], b"a"), "section 0"),
        (forge([{}, [[1, crc(b"a"), {}]]], b"a"), "section 0"),
        (forge([{}, [[1, crc(b"a")]]], b"a"), "section 0"),
        (forge([{}, [[2**64 - 1, crc(b"a"), []]]], b"a"), "more than 64 bits"),
        (forge([{"x": float("nan")}, []]), "not finite"),
        (forge([{"x": float("inf")}, []]), "not finite"),
        (forge([{1: 2}, []]), "damaged"),
        (forge([{b"a": 2}, []]), "keys must be strings"),
        (forge(None, plain=b"\x92\x82\xa1a\1\xa1a\2\x90"), "a key occurs twice"),
        (forge([msgpack.ExtType(5, b"x"), []]), "unknown type 5"),
        (forge([msgpack.Timestamp(1), []]), "cannot hold Timestamp"),
        (forge(None, plain=msgpack.packb([{}, []]) + b"\0"), "bytes are left"),
        (forge(None, plain=b"\x92\xa2\xff\xfe\x90"), "damaged"),
        (forge(None, plain=b"\xdd\x7f\xff\xff\xff"), "damaged"),
        (forge(None, plain=b"\xdd\x7f\xff\xff\xff" * 400), "damaged"),
        (forge(None, plain=b"\x91" * 100_000 + b"\x90"), "damaged"),
        (forge(None, plain=b"\xc6\xff\xff\xff\xff"), "damaged"),
        (forge(None, plain=bytes(50 << 20)), "does not end within"),
    ],
)
def test_hostile_files(data, words):
    with pytest.raises(ArtifactError, match=words):
        Reader(data)


def test_an_index_that_shrinks_too_well_is_still_readable(tmp_path):
    meta = "a" * 10_000_000
    write(tmp_path / "a.jom", [], meta)
    with Reader(tmp_path / "a.jom") as reader:
        assert reader.meta == meta


def test_system_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError):
        Reader(tmp_path / "none.jom")
    with pytest.raises(IsADirectoryError):
        Reader(tmp_path)
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        Writer(tmp_path)
    with pytest.raises(FileNotFoundError):
        Writer(tmp_path / "no" / "folder.jom")


@pytest.mark.parametrize("bad", [{1, 2}, np.float32(1), np.int64(1), object(), {1: "a"}])
def test_only_plain_data_is_written(tmp_path, bad):
    with Writer(tmp_path / "a.jom") as writer:
        with pytest.raises(TypeError, match=r"cannot hold|must be strings"):
            writer.add([bad], [])
        with pytest.raises(TypeError, match=r"cannot hold|must be strings"):
            writer.close(bad)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("bad", [float("nan"), 2**63])
def test_only_numbers_that_come_back_are_written(tmp_path, bad):
    with pytest.raises(ValueError, match=r"not finite|64 bits"), Writer(tmp_path / "a.jom") as w:
        w.add([bad], [])
    assert os.listdir(tmp_path) == []


def test_an_error_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.jom"
    old = write(path, [(["old"], [b"old"])], None)

    def chunks():
        yield b"new"
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"), Writer(path) as writer:
        writer.add(["new"], chunks())
    with pytest.raises(ValueError, match="call close"), Writer(path) as writer:
        writer.add(["new"], [b"new"])
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["model.jom"]
    with pytest.raises(ValueError, match="is closed"):
        writer.add(["late"], [])
    with pytest.raises(ValueError, match="is closed"):
        writer.close(None)


def test_permissions_and_links_stay(tmp_path):
    path, link = tmp_path / "model.jom", tmp_path / "link.jom"
    write(path, [], 1)
    path.chmod(0o640)
    link.symlink_to(path)
    write(link, [], 2)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    with Reader(path) as reader:
        assert reader.meta == 2


CHILD = """
import sys
from jaxopt_models.artifact import Writer
def chunks():
    while True:
        yield bytes(1 << 16)
        print("chunk", flush=True)
with Writer(sys.argv[1]) as writer:
    writer.add(["endless"], chunks())
    writer.close(None)
"""


def kill_while_writing(path):
    child = subprocess.Popen([sys.executable, "-c", CHILD, path], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"chunk\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.jom"
    old = write(path, [(["old"], [b"old"])], None)
    kill_while_writing(path)
    assert path.read_bytes() == old
    left = [name for name in os.listdir(tmp_path) if name != "model.jom"]
    assert len(left) == 1 and left[0].startswith(".model.jom.") and left[0].endswith(".tmp")
    assert write(path, [], "new") != old


REWRITE = """
import sys
from jaxopt_models.artifact import Writer
k = 0
while True:
    with Writer(sys.argv[1]) as writer:
        for i in range(4):
            writer.add([i], [bytes([k % 256]) * 5000] * 4)
        writer.close(k)
    print(k, flush=True)
    k += 1
"""


@pytest.mark.full
@pytest.mark.parametrize("wait", np.linspace(0, 0.3, 16).tolist())
def test_a_kill_at_any_time_leaves_a_whole_file(tmp_path, wait):
    """Files replaced in a loop: whenever the kill comes, one whole file is in place."""
    path = tmp_path / "model.jom"
    child = subprocess.Popen([sys.executable, "-c", REWRITE, path], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"0\n"
    time.sleep(wait)
    child.send_signal(signal.SIGKILL)
    done = child.communicate()[0].split()
    with Reader(path) as reader:
        assert reader.meta >= int(done[-1] if done else 0)
        for i in range(4):
            assert reader.read(i) == bytes([reader.meta % 256]) * 20_000
