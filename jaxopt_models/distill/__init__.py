"""Distillation: losses on arrays, and training of students by teachers as `(init, step)`."""

from ._contrast import ContrastMemory as ContrastMemory
from ._contrast import contrast as contrast
from ._contrast import contrast_memory as contrast_memory
from ._decoupled import decoupled as decoupled
from ._decoupled import dist as dist
from ._features import attention as attention
from ._features import factor_transfer as factor_transfer
from ._features import hint as hint
from ._features import reconstruction as reconstruction
from ._features import variational as variational
from ._heads import project as project
from ._heads import projection as projection
from ._heads import translator as translator
from ._labels import bias_correction as bias_correction
from ._labels import cross_entropy as cross_entropy
from ._labels import virtual_teacher as virtual_teacher
from ._relations import pkt as pkt
from ._relations import relational_angle as relational_angle
from ._relations import relational_distance as relational_distance
from ._relations import similarity as similarity
from ._soft import kd as kd
from ._soft import logit_mse as logit_mse
