"""What a program does with its parameters: which may be scaled or rotated without being seen.

Bottom up: ``_fixed`` (what hangs on parameters only), ``_nodes`` (operations on data) and
``_rewrite`` (a traced call); ``_scales``, the ``_flow`` files and ``_links`` follow factors;
``_spaces`` and the ``_space`` files, which ask the flow how parameters are used, follow rotations.
"""

from ._fixed import LINEAR as LINEAR
from ._fixed import Ref as Ref
from ._fixed import evaluate as evaluate
from ._fixed import paths_of as paths_of
from ._links import PRODUCTS as PRODUCTS
from ._links import Chain as Chain
from ._links import Links as Links
from ._links import Member as Member
from ._links import links as links
from ._nodes import Graph as Graph
from ._nodes import Node as Node
from ._nodes import Value as Value
from ._rewrite import Traced as Traced
from ._rewrite import check_finite as check_finite
from ._rewrite import finished as finished
from ._rewrite import like as like
from ._rewrite import traced as traced
from ._rewrite import values_of as values_of
from ._space_rules import SPACE_RULES as SPACE_RULES
from ._spaces import Space as Space
from ._spaces import Spaces as Spaces
