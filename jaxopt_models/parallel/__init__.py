"""Parallel execution: compressed trees on meshes, data, model, pipeline and knowledge."""

from ._codecs import Int8 as Int8
from ._codecs import TopK as TopK
from ._data import DataParallel as DataParallel
from ._data import DataState as DataState
from ._data import data_parallel as data_parallel
from ._estimate import estimate as estimate
from ._layouts import Layout as Layout
from ._plan import Estimate as Estimate
from ._plan import Plan as Plan
from ._program import Collective as Collective
from ._program import collectives as collectives
from ._program import collectives_table as collectives_table
from ._reduce import ReduceState as ReduceState
from ._reduce import all_reduce as all_reduce
from ._shard import shard as shard
from ._shard import shardings as shardings
from ._shard import spec_of as spec_of
from ._topology import Chip as Chip
from ._topology import Topology as Topology
from ._topology import chips as chips
from ._topology import topology as topology
