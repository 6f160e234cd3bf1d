"""From an artifact to a checkpoint of Orbax, of which each device reads its part."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._encoded import Encoded
from .._progress import bar
from ..artifact._open import Opened
from ..artifact._reader import Reader
from ..artifact._skeleton import unflatten_tree
from ._hosts import guard

_WHO = "to_orbax"
# Of a large array a process reads only the pieces that its devices need.
_PIECE = 64 << 20


def to_orbax(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    types: Sequence[type[Encoded]] = (),
    progress: bool = True,
) -> None:
    """Writes the tree of an artifact as a checkpoint of Orbax, without ever holding it in memory.

    An artifact is read whole; of a checkpoint of Orbax each device gets the part that its sharding
    names. With :func:`compress_checkpoint` before, a dense checkpoint larger than any host becomes
    a compressed one that a pod restores: ``abstract`` is
    ``jax.eval_shape(lambda p: compress(p, recipe), shapes)`` with the shardings of
    :func:`shardings`.

    Tensors are read one after another and laid down beside the checkpoint, from where Orbax takes
    them: memory is that of the largest tensor, disk twice that of the tree. The folder is there
    when all of it is; a kill may leave the temporary one, ``.<name>.<random>``.

    In several processes all call it; the first does the work.

    Args:
      path: the artifact.
      folder: the checkpoint to write; it must not exist, its parent must.
      types: as for :func:`jaxopt_models.load`.
      progress: show a bar, a step for each tensor.

    Raises:
      ArtifactError: for a file that is damaged or no artifact.
      FileExistsError: if there is something at ``folder``.
      ValueError: for what Orbax cannot hold: arrays without entries, random keys, no tensor.
      OSError: if files cannot be read or written.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, orbax.checkpoint as ocp, jaxopt_models as jom
      >>> from jaxopt_models import parallel
      >>> params = {"kernel": jnp.arange(64.0).reshape(8, 8)}
      >>> encode = lambda p: jom.compress(p, [jom.Rule("kernel", jom.quant.Int(bits=4))])
      >>> with tempfile.TemporaryDirectory() as place:
      ...     _ = jom.save(f"{place}/model.jom", encode(params))
      ...     parallel.to_orbax(f"{place}/model.jom", f"{place}/checkpoint", progress=False)
      ...     with ocp.StandardCheckpointer() as checkpointer:
      ...         abstract = jax.eval_shape(encode, params)
      ...         small = checkpointer.restore(f"{place}/checkpoint", abstract)
      >>> small["kernel"].kind(), small["kernel"].codes.dtype
      ('Quantized', dtype(int4))
    """
    with guard(_WHO):  # the others wait at its end
        if jax.process_index() == 0:
            _write(path, pathlib.Path(os.path.abspath(folder)), types, progress)


def _write(path: Any, folder: pathlib.Path, types: Sequence[type], progress: bool) -> None:
    if folder.exists():
        raise FileExistsError(f"{_WHO}: there is something at {str(folder)!r}; give another folder")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{_WHO}: {str(folder.parent)!r} is no folder; make it first")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
        beside = pathlib.Path(name)
        _save(_laid_down(path, beside, types, progress), beside / "checkpoint")
        os.rename(beside / "checkpoint", folder)


def _laid_down(
    path: Any, beside: pathlib.Path, types: Sequence[type[Encoded]], progress: bool
) -> Any:
    """Returns the tree of an artifact, whose arrays are files in a folder."""
    with Reader(path) as reader:
        opened = Opened(reader, types)
        if not opened.paths:
            raise ValueError(f"{_WHO}: {path} holds no tensor, which Orbax cannot save")
        order = iter(range(len(opened.paths)))
        with bar("unpack", len(opened.paths), show=progress) as advance:

            def laid_down(_: str) -> Any:
                i = next(order)
                found = _lay_down(opened.tensor(i), beside / str(i), opened.paths[i])
                advance()
                return found

            return unflatten_tree(opened.skeleton, laid_down, dropped=beside)


def _lay_down(tensor: Any, stem: pathlib.Path, path: str) -> Any:
    """Writes the arrays of a tensor to files, and returns it with views of those for arrays."""
    arrays, treedef = jax.tree.flatten(tensor)
    views = []
    for n, x in enumerate(arrays):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or not x.size:
            what = "random keys" if x.size else "arrays without entries"
            raise ValueError(f"{_WHO}: {path}: Orbax cannot hold {what}; leave it out of the tree")
        file = stem.with_name(f"{stem.name}.{n}")
        host = np.asarray(x)
        host.reshape(-1).view(np.uint8).tofile(file)
        views.append(np.memmap(file, np.uint8, "r").view(host.dtype).reshape(host.shape))
    return treedef.unflatten(views)


def _save(tree: Any, folder: pathlib.Path) -> None:
    import orbax.checkpoint as ocp

    handlers = ocp.type_handlers
    # A copy of each array, and databases of many of them, would be held in memory until the end.
    types = handlers.create_type_handler_registry(
        (jax.Array, handlers.ArrayHandler()),
        (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
        *((t, handlers.ScalarHandler()) for t in (int, float)),
        (str, handlers.StringHandler()),
    )
    alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="jaxopt_models"
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, type_handler_registry=types, multiprocessing_options=alone
    )
    pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE), tree)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(folder, ocp.args.PyTreeSave(tree, save_args=pieces))
