"""The nnx twins of the linen models: same paths, shapes and function."""

from ._nnx_lenet import LeNet5 as LeNet5
from ._nnx_lenet import LeNet300 as LeNet300
from ._nnx_lstm import LSTM as LSTM
from ._nnx_resnet import ResNet as ResNet
from ._nnx_resnet import ResNet18 as ResNet18
from ._nnx_resnet import ResNet50 as ResNet50
from ._nnx_transformer import Transformer as Transformer

__all__ = ["LSTM", "LeNet5", "LeNet300", "ResNet", "ResNet18", "ResNet50", "Transformer"]
