import io
import pickle
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch_files import (
    EMPTY_TUPLE,
    FALSE,
    MARK,
    NONE,
    REDUCE,
    STORAGES,
    archive,
    name,
    number,
    saved,
    state_dict,
    storage,
    stream,
    tensor,
    text,
    tuple_,
)
from torch_files import pickle as pickled

from jaxopt_models import models

KNOWN = [np.dtype(getattr(ml_dtypes, n, n)) for n in STORAGES]
TWELVE = np.arange(12, dtype=np.float32)
FORMS = pytest.mark.parametrize("form", [stream, archive])


def read(content, folder):
    path = folder / "weights.pth"
    path.write_bytes(content)
    return models.read_torch_file(path)


def one(offset, size, stride, *, count=12, kind="Float"):
    """A pickle of one tensor."""
    return pickled(tensor(storage("0", kind, count), offset, size, stride))


def refused(content, folder, match=None):
    with pytest.raises(ValueError, match=match) as caught:
        read(content, folder)
    assert str(caught.value).startswith(str(folder / "weights.pth"))


@given(
    arrays=st.dictionaries(
        st.text(max_size=5),
        st.sampled_from(KNOWN).flatmap(
            lambda dtype: hnp.array_shapes(min_dims=0, min_side=0, max_side=4).map(
                lambda shape: np.arange(np.prod(shape)).reshape(shape).astype(dtype)
            )
        ),
        max_size=4,
    ),
    zipped=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_reads_back_what_was_saved(tmp_path_factory, arrays, zipped):
    found = read(saved(arrays, zipped=zipped), tmp_path_factory.mktemp("torch"))
    assert list(found) == list(arrays)
    for key, array in arrays.items():
        assert found[key].dtype == array.dtype
        np.testing.assert_array_equal(found[key], array)


@FORMS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_plain_values_of_pythons_own_pickles(tmp_path, form, protocol):
    value = {
        "step": 70_000,
        1: [1.5, None, True, "ü" * 300, -(1 << 70)],
        "betas": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "more": {"inside": [[{}], "step", "betas", 255, -1]},
    }
    found = read(form(pickle.dumps(value, protocol), {}), tmp_path)
    assert found == value


@FORMS
def test_tensors_are_views_with_any_offset_and_stride(tmp_path, form):
    cases = [
        (0, (3, 4), (4, 1)),
        (0, (4, 3), (1, 4)),  # transposed
        (5, (2,), (6,)),
        (0, (4, 3), (2, 1)),  # windows that overlap
        (11, (1, 1), (1 << 62, 99)),  # steps that are never taken
        (3, (), ()),
        (12, (0, 1 << 40), (1, 1)),
    ]
    parts = b"".join(tensor(storage("0", "Float", 12), *case) for case in cases)
    found = read(form(pickled(MARK + parts + b"t"), {"0": TWELVE}), tmp_path)
    for value, (offset, size, stride) in zip(found, cases, strict=True):
        assert value.shape == size and not (value.size and value.flags.writeable)
        for index in np.ndindex(*size) if value.size else ():
            assert value[index] == offset + sum(map(np.multiply, index, stride))
    assert np.shares_memory(found[0], found[1])


@FORMS
@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (13,), (1,)),
        (1, (12,), (1,)),
        (12, (1,), (1,)),
        (12, (), ()),
        (-1, (1,), (1,)),
        (0, (2, 2), (11, 1)),
        (11, (2,), (-1,)),
        (0, (-1,), (1,)),
        (0, (1 << 40,), (0,)),  # one entry again and again
        (0, (1 << 62, 1 << 62), (0, 0)),
        (0, (2,), (1 << 62,)),
        (1 << 63, (1,), (1,)),
        (0, (3, 4), (1,)),
        (0, (1,) * 40, (1,) * 40),
        (0, (0, 1 << 63), (1, 1)),
        (0, (0, 1 << 62), (1, 1)),
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, form, offset, size, stride):
    refused(form(one(offset, size, stride), {"0": TWELVE}), tmp_path, "tensor of|array is too big")


@FORMS
@pytest.mark.parametrize("count", [11, 13, 1 << 40, 1 << 62, 1 << 70, -1])
def test_storages_of_another_size_are_refused(tmp_path, form, count):
    value = one(0, (1,), (1,), count=count)
    tracemalloc.start()
    refused(form(value, {"0": TWELVE}), tmp_path, "storage")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@FORMS
@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("collections", "Counter"),
        ("numpy", "ndarray"),
        ("torch", "QInt8Storage"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("evil", "FloatStorage"),
        ("torch._utils._rebuild_tensor_v2", "__globals__"),
    ],
)
def test_other_names_are_refused_before_they_are_looked_up(tmp_path, form, module, what):
    call = tuple_(text(f"touch {tmp_path}/ran")) + REDUCE + b"."
    for mention in (name(module, what), text(module) + text(what) + b"\x93"):
        refused(form(mention + call, {}), tmp_path, f"it asks for '{module}.{what}'")
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pth"]


MADE = name("collections", "OrderedDict") + EMPTY_TUPLE + REDUCE
REBUILD = name("torch._utils", "_rebuild_tensor_v2")
TENSOR = tensor(storage("0", "Float", 12), 0, (12,), (1,))

# Each tuple holds the one before ten times: 10 ** 40 values in 500 bytes.
LAUGHS = MARK + EMPTY_TUPLE + (b"q\x00" + MARK + b"h\x00" * 10 + b"t") * 40 + b"t"


@FORMS
@pytest.mark.parametrize(
    ("body", "says"),
    [
        (REBUILD, "holds a Global"),
        (name("torch", "FloatStorage") + EMPTY_TUPLE + REDUCE, "calls 'torch.FloatStorage'"),
        (text("x") + EMPTY_TUPLE + REDUCE, "calls 'str'"),
        (REBUILD + b"]" + REDUCE, "calls 'torch._utils._rebuild_tensor_v2'"),
        (REBUILD + EMPTY_TUPLE + REDUCE, "a tensor of other than a storage"),
        (REBUILD + tuple_(TENSOR, number(0), EMPTY_TUPLE, EMPTY_TUPLE) + REDUCE, "other than a st"),
        (name("torch._utils", "_rebuild_parameter") + EMPTY_TUPLE + REDUCE, "a parameter of"),
        (name("collections", "OrderedDict") + tuple_(b"]") + REDUCE, "an OrderedDict made of"),
        (TENSOR + b"}" + b"b", "changes .* as a dict"),
        (REBUILD + b"}" + b"b", "changes Global as a dict"),
        (storage("0", "Float", 12), "holds a _Storage"),
        (storage("0", "Float", 12, tuple_(text("1"))), "a reference to other than"),
        (text("storage") + b"Q", "a reference to other than"),
        (tuple_(text("storage"), text("torch.FloatStorage"), text("0")) + b"Q", "a reference to"),
        (
            tuple_(text("storage"), REBUILD, text("0"), text("cpu"), number(12)) + b"Q",
            "is 12 entries of",
        ),
        (b"}" + tuple_(FALSE) + NONE + b"s", "a key of a dict is a tuple"),
        (b"}" + TENSOR + NONE + b"s", "a key of a dict is a"),
        (b"}" + MARK + NONE + b"u", "a key that has no value"),
        (b"]" + text("x") + NONE + b"s", "changes list as a dict"),
        (NONE + NONE + b"a", "changes NoneType as a list"),
        (b"", "ends with other than one value"),
        (NONE + NONE, "ends with other than one value"),
        (NONE + MARK, "ends with other than one value"),
        (b"t", "without a mark"),
        (NONE + MARK + b"\x85", "takes a value where none is"),
        (b"q\x00", "changes nothing"),
        (b"h\x07", "mentions value 7"),
        (b"I1\n", "operation b'I'"),
        (b"]" + b"q\x00" + b"h\x00" + b"a", "more than 64 containers"),
        (b"]" * 66 + b"a" * 65, "more than 64 containers"),
        (b"]" * 100_000 + b"a" * 99_999 + b"Q", "a reference to other than"),
        (REBUILD + b"]" * 100_000 + b"a" * 99_999 + b"\x85" + REDUCE, "other than a storage"),
        (LAUGHS + b"Q", "a reference to other than"),
        (REBUILD + LAUGHS + REDUCE, "other than a storage"),
    ],
)
def test_pickles_of_anything_else_are_refused(tmp_path, form, body, says):
    refused(form(pickled(body), {"0": TWELVE} if form is archive else {}), tmp_path, says)


@FORMS
def test_containers_that_unfold_without_end_are_refused(tmp_path, form):
    refused(form(pickled(LAUGHS), {}), tmp_path, "used again and again")
    size = tensor(storage("0", "Float", 12), 0, (), ()).replace(MARK + b"t", LAUGHS, 1)
    refused(form(pickled(size), {"0": TWELVE}), tmp_path, "whose size, stride or offset is no")
    # Each list is shallow where it is found first, and deep where it is used.
    chain = b"".join(b"](" + (b"h%c" % i if i else NONE) + b"eq%c" % (i + 1) for i in range(100))
    refused(form(pickled(MARK + chain + b"t"), {}), tmp_path, "used again and again")


@FORMS
@pytest.mark.parametrize(
    "body",
    [
        b"X" + struct.pack("<I", 0xFFFFFFFF),
        b"\x8d" + struct.pack("<Q", 1 << 62),
        b"\x95" + struct.pack("<Q", 1 << 62),
        b"N" + b"r" + struct.pack("<I", 0xFFFFFFFF) + b"N",
        b"\x8a\xff",
        b"\x8e" + struct.pack("<Q", 1 << 62),
    ],
)
def test_forged_lengths_take_no_memory(tmp_path, form, body):
    content = form(pickled(body), {})
    tracemalloc.start()
    refused(content, tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_other_files_are_refused(tmp_path):
    for content in (b"", b"PK", b"\x80\x02N.", b"{}", pickle.dumps({"a": 1}), b"PK\x03\x04" * 9):
        refused(content, tmp_path)
    with pytest.raises(FileNotFoundError):
        models.read_torch_file(tmp_path / "nowhere")


def test_streams_need_their_header_and_their_storages(tmp_path):
    whole = saved({"w": TWELVE})
    refused(whole + b"\0", tmp_path, "the storages end at byte")
    refused(whole[:-1], tmp_path, "the storages end at byte")
    refused(whole.replace(b"\x88u.", b"\x89u."), tmp_path, "its header is another one")
    refused(whole.replace(number(1001) + b".", number(1002) + b"."), tmp_path, "header is another")
    refused(stream(one(0, (1,), (1,)), {"1": TWELVE}), tmp_path, "are not those of the tensors")
    refused(stream(one(0, (1,), (1,)), {}), tmp_path, "are not those of the tensors")
    twice = [tensor(storage("0", kind, 12), 0, (1,), (1,)) for kind in ("Float", "Int")]
    refused(stream(pickled(b"".join(twice) + b"\x86"), {"0": TWELVE}), tmp_path, "in two ways")


def test_archives_need_plain_records(tmp_path):
    value = state_dict({"w": TWELVE})
    parts = {"0": TWELVE}
    refused(archive(value, parts, compression=zipfile.ZIP_DEFLATED), tmp_path, "is compressed")
    refused(archive(value, parts, byteorder=b"big"), tmp_path, "byteorder is b'big'")
    refused(archive(value, {}), tmp_path, "the storage '0' is missing")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("a/data.pkl", pickled(NONE))
        out.writestr("b/data.pkl", pickled(NONE))
    refused(file.getvalue(), tmp_path, "2 records data.pkl")


def test_booleans_are_zero_or_one(tmp_path):
    value = one(0, (3,), (1,), count=3, kind="Bool")
    found = read(archive(value, {"0": np.array([True, False, True])}), tmp_path)
    assert found.tolist() == [True, False, True]
    refused(archive(value, {"0": np.uint8([0, 1, 2])}), tmp_path, "no booleans")


WHOLE = {
    zipped: saved({"a": TWELVE.reshape(3, 4), "b": TWELVE}, zipped=zipped) for zipped in (0, 1)
}


@given(data=st.data(), zipped=st.sampled_from([0, 1]))
@settings(max_examples=400, deadline=None)
def test_damaged_files_raise_value_error_or_are_read(tmp_path_factory, data, zipped):
    content = bytearray(WHOLE[zipped])
    spots = st.integers(0, len(content) - 1)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(spots)
        match data.draw(st.sampled_from(["change", "cut", "drop", "insert", "repeat"])):
            case "change":
                content[at : at + 1] = data.draw(st.binary(min_size=1, max_size=8))
            case "cut":
                del content[at:]
            case "drop":
                del content[at : at + data.draw(st.integers(1, 16))]
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "repeat":
                content[at:at] = content[at : at + data.draw(st.integers(1, 64))]
    only_value_errors(bytes(content), tmp_path_factory)


OPERATIONS = [bytes([op]) for op in b"(tRbQseuaN]})q\x00h\x00\x85\x86\x87\x88\x93\x94K\x05M.r\x8aX"]
PIECES = [
    *OPERATIONS,
    MADE,
    TENSOR,
    REBUILD,
    text("storage"),
    storage("0", "Float", 12),
    b"(t",
    b"0",
]


@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=30), form=st.sampled_from([stream, archive])
)
@example(pieces=[b"]", b"q\x00", b"h\x00", b"a"], form=archive)
@settings(max_examples=400, deadline=None)
def test_any_operations_raise_value_error_or_are_read(tmp_path_factory, pieces, form):
    only_value_errors(form(pickled(b"".join(pieces)), {"0": TWELVE}), tmp_path_factory)


def only_value_errors(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    path.write_bytes(content)
    try:
        value = models.read_torch_file(path)
    except ValueError as error:
        assert str(error).startswith(str(path))
        return
    pickle.dumps(value)  # It is a tree that others can walk.
