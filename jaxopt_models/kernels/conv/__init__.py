"""Convolutions with packed integer codes; ``conv`` is the operation."""

from .api import conv as conv
