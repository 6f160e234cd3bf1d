"""Real images and texts for tests, notebooks and benchmarks; needs NumPy only.

`fashion_mnist_small()` comes with the package. `mnist()`, `fashion_mnist()`, `vader()` and
`tux_paint()`, whose images need Pillow, read the full sets from where a package manager put them.
Nothing is ever downloaded.
"""

from ._idx import read_idx as read_idx
from ._images import Examples as Examples
from ._images import Images as Images
from ._images import Shuffled as Shuffled
from ._images import Split as Split
from ._images import normalize as normalize
from ._images import shuffled as shuffled
from ._sets import fashion_mnist as fashion_mnist
from ._sets import mnist as mnist
from ._small import fashion_mnist_small as fashion_mnist_small
from ._stamps import Stamps as Stamps
from ._stamps import StampSplit as StampSplit
from ._stamps import tux_paint as tux_paint
from ._text import Sentences as Sentences
from ._text import Texts as Texts
from ._text import TextSplit as TextSplit
from ._text import vader as vader
