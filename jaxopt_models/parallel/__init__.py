"""Programs for many devices: what they send to each other, and what they need."""

from ._program import Collective as Collective
from ._program import collectives as collectives
from ._program import collectives_table as collectives_table
