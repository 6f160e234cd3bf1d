"""Parallelism: sharding, data, model, pipeline and knowledge."""

from ._apart import Apart as Apart
from ._apart import apart as apart
