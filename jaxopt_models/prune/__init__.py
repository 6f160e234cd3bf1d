"""Pruning: masks as encoders, planners over all layers, schedules for training."""

from ._allocate import allocate_global as allocate_global
from ._gradual import GradualState as GradualState
from ._gradual import cubic_schedule as cubic_schedule
from ._gradual import gradual as gradual
from ._magnitude import Block as Block
from ._magnitude import Magnitude as Magnitude
from ._magnitude import NofM as NofM
from ._rigl import RigLState as RigLState
from ._rigl import rigl as rigl
