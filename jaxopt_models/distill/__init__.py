"""Distillation: losses on arrays, and training of students by teachers as `(init, step)`."""

from ._blend import blend as blend
from ._blend import confidence as confidence
from ._classification import classification as classification
from ._decoupled import decoupled as decoupled
from ._decoupled import dist as dist
from ._features import hint as hint
from ._fit import Fitted as Fitted
from ._fit import fit as fit
from ._labels import bias_correction as bias_correction
from ._labels import cross_entropy as cross_entropy
from ._labels import virtual_teacher as virtual_teacher
from ._network import Network as Network
from ._network import Seen as Seen
from ._soft import kd as kd
from ._soft import logit_mse as logit_mse
from ._state import Scheme as Scheme
from ._state import State as State
from ._stored import TopK as TopK
from ._stored import load_stored as load_stored
from ._stored import store as store
from ._stored import top_k as top_k
from ._succession import succession as succession
from ._teach import joint as joint
from ._teach import mutual as mutual
from ._teach import stored as stored
from ._teach import teacher_student as teacher_student
