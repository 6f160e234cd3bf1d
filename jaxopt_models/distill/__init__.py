"""Distillation: losses on arrays, and training of students by teachers as `(init, step)`."""

from ._decoupled import decoupled as decoupled
from ._decoupled import dist as dist
from ._features import hint as hint
from ._labels import bias_correction as bias_correction
from ._labels import cross_entropy as cross_entropy
from ._labels import virtual_teacher as virtual_teacher
from ._soft import kd as kd
from ._soft import logit_mse as logit_mse
