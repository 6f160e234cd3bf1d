"""Parallelism of dense and compressed models over meshes of devices."""

from ._constrain import constrain as constrain
from ._fsdp import fsdp as fsdp
from ._gathered import gathered as gathered
from ._rules import Rules as Rules
from ._tensor import tensor as tensor
