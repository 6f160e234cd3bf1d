"""Reference models, as linen modules here and as nnx twins in `models.nnx`.

The twins have the same parameter paths (`ip1/kernel`), shapes and function.
"""

from . import _nnx as nnx
from ._lenet import LeNet5 as LeNet5
from ._lenet import LeNet300 as LeNet300
from ._lstm import LSTM as LSTM
from ._resnet import ResNet as ResNet
from ._resnet import ResNet18 as ResNet18
from ._resnet import ResNet50 as ResNet50
from ._transformer import Transformer as Transformer

__all__ = ["LSTM", "LeNet5", "LeNet300", "ResNet", "ResNet18", "ResNet50", "Transformer", "nnx"]
