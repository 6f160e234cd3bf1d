"""Distillation: losses on arrays, and training of students by teachers as `(init, step)`."""

from ._features import hint as hint
from ._labels import cross_entropy as cross_entropy
from ._soft import kd as kd
from ._soft import logit_mse as logit_mse
