"""Parallelism: sharding, data, model, pipeline and knowledge."""

from ._apart import Apart as Apart
from ._apart import apart as apart
from ._pipeline import Pipeline as Pipeline
from ._pipeline import pipeline as pipeline
from ._steps import ApartState as ApartState
from ._steps import Training as Training
from ._timetable import Phase as Phase
from ._timetable import Timetable as Timetable
from ._loops import ticks as ticks
