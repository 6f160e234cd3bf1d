"""jaxopt_models: makes any JAX model smaller, by pure functions on its parameters.

A compressed parameter is a pytree node that stands where the array stood and knows how to
rebuild it. ``import jaxopt_models as jom``; unrelated to the JAXopt library.
"""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

from . import _dispatch as _dispatch
from . import _dispatch_stored as _dispatch_stored
from . import artifact as artifact
from . import codebook as codebook
from . import distill as distill
from . import kernels as kernels
from . import prune as prune
from . import quant as quant
from ._accelerate import accelerate as accelerate
from ._accelerate import simulate as simulate
from ._axes import Axes as Axes
from ._bits import pack_bits as pack_bits
from ._bits import pack_codes as pack_codes
from ._bits import unpack_bits as unpack_bits
from ._bits import unpack_codes as unpack_codes
from ._calibrate import Calibration as Calibration
from ._calibrate import Stats as Stats
from ._calibrate import calibrate as calibrate
from ._chain import chain as chain
from ._compress import compress as compress
from ._compress import straight_through as straight_through
from ._encoded import Encoded as Encoded
from ._encoded import Masked as Masked
from ._encoded import leaf as leaf
from ._encoded import materialize as materialize
from ._encoded import static as static
from ._encoder import Encoder as Encoder
from ._functional import functional as functional
from ._latent import Latent as Latent
from ._pack import pack as pack
from ._partition import combine as combine
from ._partition import partition as partition
from ._plan import plan as plan
from ._prepare import prepare as prepare
from ._recipe import Rule as Rule
from ._recipe import recipe_from_json as recipe_from_json
from ._recipe import recipe_to_json as recipe_to_json
from ._report import report as report
from ._table import Table as Table
from ._taps import taps as taps
from ._verify import VerifyError as VerifyError
from ._verify import verify as verify
from ._version import __version__ as __version__
from .artifact import load as load
from .artifact import save as save

if _TYPE_CHECKING:
    from . import data as data
    from . import models as models
    from . import parallel as parallel
    from . import testing as testing
    from ._checkpoint import read_checkpoint as read_checkpoint
    from ._layers import layers as layers
    from ._pipeline import Steps as Steps
    from ._pipeline import deep_compression as deep_compression

# Reached on first use: they bring flax, orbax or the data with them.
_LAZY = {
    "data": "data",
    "models": "models",
    "parallel": "parallel",
    "testing": "testing",
    "Steps": "_pipeline",
    "deep_compression": "_pipeline",
    "layers": "_layers",
    "read_checkpoint": "_checkpoint",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxopt_models' has no attribute {name!r}")
    module = _importlib.import_module(f".{_LAZY[name]}", __name__)
    return module if _LAZY[name] == name else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
