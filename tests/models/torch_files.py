"""Files as `torch.save` writes them, put together byte by byte."""

import io
import struct
import zipfile

import numpy as np

STORAGES = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "complex64": "ComplexFloat",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
}
NONE, FALSE, MARK, REDUCE, EMPTY_TUPLE = b"N", b"\x89", b"(", b"R", b")"


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value):
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tuple_(*parts):
    return MARK + b"".join(parts) + b"t"


def name(module, what):
    return f"c{module}\n{what}\n".encode()


def pickle(body):
    return b"\x80\x02" + body + b"."


def storage(key, kind, count, *more):
    parts = text("storage"), name("torch", f"{kind}Storage"), text(key), text("cpu"), number(count)
    return tuple_(*parts, *more) + b"Q"


def tensor(stored, offset, size, stride, *, make="_rebuild_tensor_v2"):
    axes = [tuple_(*map(number, numbers)) for numbers in (size, stride)]
    hooks = name("collections", "OrderedDict") + EMPTY_TUPLE + REDUCE
    args = tuple_(stored, number(offset), *axes, FALSE, hooks)
    return name("torch._utils", make) + args + REDUCE


def strides(shape):
    return [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]


def state_dict(arrays, *more):
    """The pickle of an ordered dict with attributes, as modules have."""
    items = b"".join(
        text(key)
        + tensor(
            storage(str(i), STORAGES[array.dtype.name], array.size, *more),
            0,
            array.shape,
            strides(array.shape),
        )
        for i, (key, array) in enumerate(arrays.items())
    )
    attributes = b"}" + text("_metadata") + b"}" + b"s"
    made = name("collections", "OrderedDict") + EMPTY_TUPLE + REDUCE
    return pickle(made + b"q\x00" + MARK + items + b"u" + attributes + b"b")


def stream(value, storages):
    """The older form; storages are arrays by key."""
    info = b"}" + MARK + text("protocol_version") + number(1001) + text("little_endian") + b"\x88u"
    header = [number(119547037146038801333356), number(1001), info]
    keys = b"]" + MARK + b"".join(map(text, storages)) + b"e"
    data = [struct.pack("<q", array.size) + array.tobytes() for array in storages.values()]
    return b"".join([*map(pickle, header), value, pickle(keys), *data])


def archive(value, storages, *, compression=zipfile.ZIP_STORED, byteorder=b"little"):
    """The form of torch 1.6 and later."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as out:
        out.writestr("weights/data.pkl", value)
        out.writestr("weights/byteorder", byteorder)
        for key, array in storages.items():
            out.writestr(f"weights/data/{key}", array.tobytes())
        out.writestr("weights/version", "3\n")
    return file.getvalue()


def saved(arrays, *, zipped=False):
    """What `torch.save(dict_of_tensors)` writes."""
    storages = {str(i): array for i, array in enumerate(arrays.values())}
    if zipped:
        return archive(state_dict(arrays), storages)
    return stream(state_dict(arrays, NONE), storages)
