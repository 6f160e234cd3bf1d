"""Checkpoints of a run in stages, by Orbax."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._spread import on_host, together


class Checkpoints:
    """One Orbax checkpoint manager for each stage of a run, below one folder.

    Args:
      folder: where to keep them; ``None`` for nowhere.
      identity: what makes a run this run; a folder of another one is refused.

    Raises:
      ValueError: if the folder belongs to a run with another identity.
    """

    def __init__(self, folder: str | os.PathLike | None, identity: dict[str, str]):
        self.folder = None if folder is None else pathlib.Path(os.path.abspath(folder))
        self.managers: dict[str, Any] = {}
        if self.folder is None:
            return
        error = None
        if jax.process_index() == 0:
            try:
                claim(self.folder, identity, "checkpoint")
            except Exception as e:  # of a folder that cannot be written, too: the others wait
                error = e
        together("checkpoint")
        if error is not None:
            raise error
        claim(self.folder, identity, "checkpoint")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        for manager in self.managers.values():
            manager.close()

    def save(self, stage: str, state: Any) -> None:
        """Saves the state of a stage under its own step count, and waits for it."""
        if self.folder is None:
            return
        import orbax.checkpoint as ocp

        manager = self._manager(stage)
        step = int(state.step)
        if manager.latest_step() == step:
            return
        manager.save(step, args=ocp.args.StandardSave(_arrays(state)))
        manager.wait_until_finished()

    def restore(self, stage: str, state: Any) -> Any:
        """Returns the last saved state of a stage, or ``state`` if there is none."""
        if self.folder is None or (step := self._manager(stage).latest_step()) is None:
            return state
        import orbax.checkpoint as ocp

        want = _arrays(state)
        found = self._manager(stage).restore(step, args=ocp.args.StandardRestore(want))
        leaves, treedef = jax.tree.flatten(state)
        new = [_like(old, found[name]) for name, old in zip(want, leaves, strict=True)]
        return treedef.unflatten(new)

    def _manager(self, stage: str) -> Any:
        import orbax.checkpoint as ocp

        assert self.folder is not None
        if stage not in self.managers:
            options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
            self.managers[stage] = ocp.CheckpointManager(self.folder / stage, options=options)
        return self.managers[stage]


def claim(
    folder: pathlib.Path,
    identity: dict[str, str],
    option: str,
    fix: str = "Give another folder, or remove this one to start anew",
) -> None:
    """Makes a folder that of a run, or raises a `ValueError` if it is that of another."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"{option}={str(folder)!r} is a file, or below one; give a folder"
        ) from None
    file = folder / "run.json"
    if not file.exists():
        _write(file, json.dumps(identity))
        return
    try:
        found = dict(json.loads(file.read_text()))
    except (TypeError, ValueError):
        raise ValueError(f"{option}: {str(file)!r} is damaged. {fix}") from None
    differ = [k for k in identity if found.get(k) != identity[k]]
    if differ:
        lines = [f"\n  {k}: {found.get(k)} there, {identity[k]} here" for k in differ]
        raise ValueError(f"{option}={str(folder)!r} is of another run:{''.join(lines)}\n{fix}")


def digest(tree: Any) -> str:
    """Returns a checksum of the values of a tree, the same in every process."""
    crc = 0
    for x in jax.tree.leaves(tree):
        x = _plain(x) if isinstance(x, jax.Array) else x
        crc = zlib.crc32(np.ascontiguousarray(on_host(x)).tobytes(), crc)
    return f"{crc:08x}"


def _arrays(state: Any) -> dict[str, jax.Array]:
    # Numbered leaves: node types and static fields come from the state that restores.
    return {f"{i:06d}": _plain(x) for i, x in enumerate(jax.tree.leaves(state))}


def _plain(x: jax.Array) -> jax.Array:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _like(old: jax.Array, new: jax.Array) -> jax.Array:
    if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))
    return new


def _write(file: pathlib.Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f.name, file)
