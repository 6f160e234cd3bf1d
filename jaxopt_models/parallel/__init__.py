"""Parallel execution: compressed trees on meshes, data, model, pipeline and knowledge."""

from ._shard import shard as shard
from ._shard import shardings as shardings
from ._shard import spec_of as spec_of
