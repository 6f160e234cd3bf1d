"""Trees that Orbax saved, whole or leaf by leaf."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np


class OrbaxTree:
    """A tree that Orbax saved; arrays are restored to the host, whatever devices they were on.

    Args:
      folder: where it lies.

    Raises:
      ValueError: if Orbax cannot read it.
    """

    def __init__(self, folder: str):
        import orbax.checkpoint as ocp
        from etils import epath

        self.folder = folder
        self._ocp = ocp
        self._where = epath.Path(os.path.abspath(folder))
        about = self._checked(lambda handler: handler.metadata(self._where).tree)
        #: What Orbax says of each leaf, arrays with `shape` and `dtype`, and their tree.
        self.about, self.treedef = jax.tree.flatten(about)

    def read(self) -> Any:
        """Restores all of it."""
        return self._restore(None)

    def leaves(self, wanted: Collection[int]) -> list[Any]:
        """Restores some of the leaves, by their numbers in :attr:`about`, in that order."""
        blank = self._ocp.PLACEHOLDER
        some = [about if i in wanted else blank for i, about in enumerate(self.about)]
        found = self.treedef.flatten_up_to(self._restore(self.treedef.unflatten(some)))
        return [found[i] for i in sorted(wanted)]

    def _restore(self, item: Any) -> Any:
        args = self.treedef.unflatten([self._host(about) for about in self.about])
        restore = self._ocp.args.PyTreeRestore(item=item, restore_args=args)
        return self._checked(lambda handler: handler.restore(self._where, args=restore))

    def _host(self, about: Any) -> Any:
        return self._ocp.RestoreArgs(restore_type=np.ndarray if hasattr(about, "dtype") else None)

    def _checked(self, read: Callable[[Any], Any]) -> Any:
        handler = self._ocp.PyTreeCheckpointHandler()
        try:
            return read(handler)
        except Exception as e:  # each store has errors of its own, of no common type
            what = " ".join(str(e).split())
            raise ValueError(
                f"{self.folder}: Orbax cannot read it: {type(e).__name__}: {what:.300}"
            ) from e
        finally:
            handler.close()
