"""Compiled kernels for compressed parameters, built at first use for the machine at hand.

Lay parameters out once with :func:`jaxopt_models.pack`, and :func:`jaxopt_models.accelerate` runs
these where a program is compiled for a CPU. Without a C++ compiler everything runs on XLA. On a GPU
``matmul`` reads parameters that are not laid out.
"""

from . import binary as binary
from . import conv as conv
from . import matmul as matmul
from . import sparse as sparse
from ._build import BuildError as BuildError
from ._build import clear as clear
from ._load import Loaded as Loaded
from ._load import forced as forced
from ._load import status as status
from ._memory import keep_memory as keep_memory
