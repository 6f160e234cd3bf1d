"""Where published weights are found, and how they become the variables of a module."""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


class Source(NamedTuple):
    """A published model: who loads it, and where its files lie in an installed package."""

    loader: str
    variable: str
    package: str
    inside: str
    command: str


def find(source: Source, file: str, path: str | os.PathLike[str] | None) -> Path:
    """Gives the path of one file of a published model; the package is never imported.

    Raises:
      FileNotFoundError: listing the places and the command that gets the model.
    """
    looked = []
    for place, origin in _places(source, path):
        if place.is_file() and place.suffix == Path(file).suffix:
            return place
        if (place / file).is_file():
            return place / file
        lack = f"no {file}" if place.exists() else "no such file or folder"
        looked.append(f"  {place} ({origin}): {lack}")
    if path is None and not os.environ.get(source.variable):
        looked.append(f"  (the environment variable {source.variable} is not set)")
    if path is None and not _package(source):
        looked.append(f"  (the package {source.package} is not installed)")
    raise FileNotFoundError(
        f"{source.loader}: {file} is in none of these places:\n"
        + "\n".join(looked)
        + f"\nTo get it: {source.command}"
    )


def _places(source: Source, path: str | os.PathLike[str] | None) -> Iterator[tuple[Path, str]]:
    if path is not None:
        yield Path(path), "path"
        return
    if named := os.environ.get(source.variable):
        yield Path(named), source.variable
    for folder in _package(source):
        yield Path(folder, source.inside), "installed package"


def _package(source: Source) -> list[str]:
    # Of a package at the top `find_spec` runs no code; importing these would bring torch.
    spec = importlib.util.find_spec(source.package)
    return list(spec.submodule_search_locations or ()) if spec else []


def assemble(
    tensors: Mapping[str, Any],
    names: Mapping[str, str],
    shapes: Any,
    *,
    file: str | os.PathLike[str],
) -> dict[str, Any]:
    """Puts tensors of torch in the places of a module, and checks that all fit and none is left.

    Args:
      tensors: by name, as torch lays them out: `[out, in]` and `[out, in, height, width]`.
      names: the path of each value of the module, `params/stem/kernel`, to the tensor's name.
      shapes: the module's variables, as `jax.eval_shape` gives them.
      file: named in errors.

    Returns:
      The variables as JAX arrays: `[in, out]` and `[height, width, in, out]`.

    Raises:
      ValueError: if a tensor is missing, is none of the module, or has another shape or dtype.
    """
    wanted = flatten_dict(shapes, sep="/")
    if lost := sorted(name for path, name in names.items() if name not in tensors):
        raise ValueError(f"{file}: no tensor {lost[0]!r}{_more(lost)}; is it another model?")
    if extra := sorted(set(tensors) - set(names.values())):
        raise ValueError(
            f"{file}: tensor {extra[0]!r:.200}{_more(extra)} is not in the module; give the "
            "module with the sizes of the file"
        )
    found = {}
    for path, shape in wanted.items():
        value = tensors[names[path]]
        if not isinstance(value, np.ndarray) or not jnp.issubdtype(value.dtype, jnp.floating):
            what = getattr(value, "dtype", type(value).__name__)
            raise ValueError(f"{file}: {names[path]!r} is {what}, expected an array of floats")
        turned = _turned(value) if path.endswith("/kernel") else value
        if turned.shape != shape.shape:
            raise ValueError(
                f"{file}: {names[path]!r} has shape {value.shape}, which makes {path} "
                f"{turned.shape}, expected {shape.shape}; give the module with these sizes"
            )
        found[path] = jnp.array(turned, shape.dtype)
    return unflatten_dict(found, sep="/")


def _turned(value: np.ndarray) -> np.ndarray:
    """From torch's order of axes to `[*window, in, out]`."""
    return value.transpose(*range(2, value.ndim), 1, 0) if value.ndim > 1 else value


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def dotted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Gives nested dicts as one, with the names of the file."""
    return flatten_dict(tree, sep=".")


def like(module: Any, *args: Any) -> Any:
    """Gives the shapes of a module's variables."""
    return jax.eval_shape(module.init, jax.random.key(0), *args)
