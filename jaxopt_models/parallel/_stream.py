"""Compression of checkpoints larger than memory, from file to file."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import jax

from .._compress import check_key, encode
from .._paths import flatten
from .._progress import bar
from .._recipe import Decision, Rule, decide
from .._resume import claim, digest
from .._spread import on_host, together
from .._version import __version__
from ..artifact._container import check_plain
from ..artifact._file import check_stored_as, recipe_text
from ..artifact._skeleton import flatten_tree
from ._flow import flow
from ._hosts import agree, guard, share
from ._parts import Part, assemble, clear, finished
from ._sections import Job, Options
from ._source import open_source

_WHO = "compress_checkpoint"


def compress_checkpoint(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    recipe: Sequence[Rule],
    *,
    stats: Any = None,
    key: jax.Array | None = None,
    coding: bool = True,
    dense: str | None = None,
    progress: bool = True,
) -> int:
    """Compresses a checkpoint to an artifact without ever holding it in memory.

    The file holds what ``save(path, compress(read_checkpoint(source), recipe), recipe=recipe)``
    writes, byte for byte, but tensors go from file to file one after another: reading, encoding
    and writing overlap, and memory is that of three times the largest tensor at most (less for
    encoders of number formats in groups, which are fed slices).

    A run that was killed, called again with the same arguments, goes on after the last tensor that
    was written, and ends in the same file. Until then ``path`` holds what it held before; what is
    finished lies beside it in the folder ``.<name>.streaming``.

    In several processes (:func:`start`) each compresses its share of the bytes; the file must lie
    on a disk that all of them see. If one is lost, the others stop; a new start goes on, with as
    many processes or another number.

    Args:
      source: as for :func:`jaxopt_models.read_checkpoint`: safetensors, or a folder of Orbax.
      path: the artifact to write; its folder must exist.
      recipe: rules, most specific first; kept in the file.
      stats: ``{path: statistics}`` from calibration, for encoders that need them.
      key: random key for encoders that draw.
      coding: ``False`` leaves out entropy coding; see :func:`jaxopt_models.save`.
      dense: a type for `float32` arrays that stay dense; see :func:`jaxopt_models.save`.
      progress: show a bar, a step for each tensor.

    Returns:
      The size of the file in bytes.

    Raises:
      ValueError: for a damaged checkpoint, one that is compressed already, a recipe that does not
        fit, a path that is a file of the source, leftovers of a run with other arguments, or
        processes with other arguments.
      TypeError: for options of another type.
      OSError: if files cannot be read or written, or another run writes the same one.

    Example:
      >>> import json, os, tempfile, numpy as np, jaxopt_models as jom
      >>> from jaxopt_models import parallel
      >>> w = np.linspace(-1, 1, 64 * 8, dtype=np.float32).reshape(64, 8)
      >>> about = {"ip1.weight": {"dtype": "F32", "shape": [64, 8], "data_offsets": [0, 2048]}}
      >>> header = json.dumps(about).encode()
      >>> recipe = [jom.Rule(".*", jom.quant.Int(bits=4, group=32))]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     source, path = f"{folder}/model.safetensors", f"{folder}/model.jom"
      ...     with open(source, "wb") as f:
      ...         _ = f.write(len(header).to_bytes(8, "little") + header + w.tobytes())
      ...     size = parallel.compress_checkpoint(source, path, recipe, progress=False)
      ...     small = jom.load(path)
      >>> small["ip1"]["weight"].kind(), size < w.nbytes / 2
      ('Quantized', True)
    """
    check_key(key, _WHO)
    check_stored_as(dense, coding, _WHO)
    path = os.path.realpath(path)
    if os.path.isdir(path):
        raise IsADirectoryError(f"{_WHO}: cannot write an artifact to {path!r}: it is a folder")
    if not os.path.isdir(os.path.dirname(path)):
        raise FileNotFoundError(f"{_WHO}: {os.path.dirname(path)!r} is no folder; make it first")
    with guard(_WHO):  # a source that one process alone cannot read stops all of them
        opened = open_source(source, _WHO)
        if any(os.path.exists(path) and os.path.samefile(path, f) for f in opened.files):
            raise ValueError(f"{_WHO}: {path!r} is a file of the source; give another path")
        if not isinstance(stats, (Mapping, NoneType)):
            raise TypeError(f"{_WHO}: stats is {type(stats).__name__}; give what calibrate returns")
        # Of all processes, where statistics were collected by all of them.
        stats = None if stats is None else jax.tree.map(on_host, stats)
        options = Options(stats, key, coding, dense, _WHO)
        skeleton, jobs = _jobs(opened, recipe)
        _try_shapes(jobs, options)
        text = recipe_text(recipe)
        facts = {
            "source": opened.content,
            "recipe": text,
            "stats": digest(stats),
            "key": digest(key),
            "coding": str(coding),
            "dense": str(dense),
            "version": __version__,
            "jax": jax.__version__,
        }
    agree(_WHO, path=path, **facts)
    folder = pathlib.Path(os.path.dirname(path), f".{os.path.basename(path)}.streaming")
    me, count = jax.process_index(), jax.process_count()
    with guard(_WHO):
        if me == 0:
            clear(folder)
            fix = "Finish that run, or remove the folder to start anew"
            claim(folder, {**facts, "files": opened.written}, f"{_WHO}: unfinished", fix)
        together("claimed")
        done = finished(folder)
        together("read")  # before anybody writes
        todo = [job for job in jobs if job.number not in done]
        owners = share([job.tensor.nbytes for job in todo], count)
        mine = [job for job, owner in zip(todo, owners, strict=True) if owner == me]
        part = Part(folder, me)
        try:
            show = progress and me == 0
            before = len(jobs) - len(todo)
            with bar("compress", len(mine) + before, done=before, show=show) as advance:
                flow(mine, options, part, advance)
        except Exception as e:
            e.add_note(
                f"What is finished stays in {str(folder)!r}, and a call with the same arguments "
                "goes on from there; remove that folder before one with others."
            )
            raise
        finally:
            part.close()
        together("written")
        size = 0
        if me == 0:
            size = assemble(folder, len(jobs), path, [__version__, text, skeleton])
        together("assembled")
        return size or os.path.getsize(path)


def _try_shapes(jobs: Sequence[Job], options: Options) -> None:
    """Raises what encoding would, but for what only values tell, before anything is written."""
    seen = set()
    for job in jobs:
        d, blank = job.decision, job.tensor.blank
        kind = (id(d.rule), blank.shape, blank.dtype, options.stats is None or job.path)
        if d.encoder is None or kind in seen:
            continue
        seen.add(kind)

        def encoded(w: Any, d: Decision = d) -> Any:
            decision = dataclasses.replace(d, parameter=dataclasses.replace(d.parameter, value=w))
            return encode(decision, stats=options.stats, key=options.key, who=options.who)

        jax.eval_shape(encoded, jax.ShapeDtypeStruct(blank.shape, blank.dtype))


def _jobs(opened: Any, recipe: Sequence[Rule]) -> tuple[Any, list[Job]]:
    """Returns the tree without its tensors, and the tensors in the order of the file."""
    decisions = {
        id(d.parameter.value): d for d in decide(flatten(opened.tree)[0], recipe, who=_WHO)
    }
    skeleton, tensors = flatten_tree(opened.tree)
    check_plain(skeleton)
    jobs = [
        Job(i, name, opened.tensors[id(blank)], decisions[id(blank)])
        for i, (name, blank) in enumerate(tensors)
    ]
    return skeleton, jobs
