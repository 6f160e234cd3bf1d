"""Parallelism: sharding, data, model, pipeline and knowledge."""

from ._ahead import ahead as ahead
from ._apart import Apart as Apart
from ._apart import apart as apart
from ._knowledge import teacher_student as teacher_student
from ._knowledge import teachers as teachers
from ._loops import ticks as ticks
from ._outputs import mean as mean
from ._outputs import vote as vote
from ._outputs import weighted as weighted
from ._peers import PeersState as PeersState
from ._peers import mutual as mutual
from ._pipeline import Pipeline as Pipeline
from ._pipeline import pipeline as pipeline
from ._steps import ApartState as ApartState
from ._steps import Training as Training
from ._timetable import Phase as Phase
from ._timetable import Timetable as Timetable
from ._towers import towers as towers
