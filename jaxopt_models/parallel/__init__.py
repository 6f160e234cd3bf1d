"""Many devices and many hosts."""

from ._hosts import agree as agree
from ._hosts import guard as guard
from ._hosts import start as start
from ._stream import compress_checkpoint as compress_checkpoint
