"""Reference models, as linen modules here and as nnx twins in `models.nnx`.

The twins have the same parameter paths (`ip1/kernel`), shapes and function. `MiniLM` and
`EfficientNetLite0` are linen only, with loaders of their published weights; nothing is ever
downloaded.
"""

from . import _nnx as nnx
from ._lenet import LeNet5 as LeNet5
from ._lenet import LeNet300 as LeNet300
from ._lite0 import EfficientNetLite0 as EfficientNetLite0
from ._lite0 import lite0_photo as lite0_photo
from ._lite0 import load_lite0 as load_lite0
from ._lstm import LSTM as LSTM
from ._minilm import MiniLM as MiniLM
from ._minilm import load_minilm as load_minilm
from ._minilm import minilm_tokens as minilm_tokens
from ._resnet import ResNet as ResNet
from ._resnet import ResNet18 as ResNet18
from ._resnet import ResNet50 as ResNet50
from ._torch_file import read_torch_file as read_torch_file
from ._transformer import Transformer as Transformer

__all__ = [
    "LSTM",
    "EfficientNetLite0",
    "LeNet5",
    "LeNet300",
    "MiniLM",
    "ResNet",
    "ResNet18",
    "ResNet50",
    "Transformer",
    "lite0_photo",
    "load_lite0",
    "load_minilm",
    "minilm_tokens",
    "nnx",
    "read_torch_file",
]
