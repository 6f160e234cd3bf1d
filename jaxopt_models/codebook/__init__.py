"""Shared weights: codebooks as encoders."""

from ._clustered import Clustered as Clustered
from ._kmeans import KMeans as KMeans
