"""Programs for many devices: what they send to each other, and what they need."""

from ._estimate import estimate as estimate
from ._layouts import Layout as Layout
from ._plan import Estimate as Estimate
from ._plan import Plan as Plan
from ._program import Collective as Collective
from ._program import collectives as collectives
from ._program import collectives_table as collectives_table
from ._topology import Chip as Chip
from ._topology import Topology as Topology
from ._topology import chips as chips
from ._topology import topology as topology
