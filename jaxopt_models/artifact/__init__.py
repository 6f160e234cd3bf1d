"""The file format: one file, entropy-coded, no pickle, checked before it is used."""

from ._audit import audit as audit
from ._errors import ArtifactError as ArtifactError
from ._file import load as load
from ._file import load_recipe as load_recipe
from ._file import save as save
from ._file import size as size
from ._inspect import inspect as inspect
from ._masks import MaskLayout as MaskLayout
from ._masks import MaskStream as MaskStream
from ._masks import decode_mask as decode_mask
from ._masks import encode_mask as encode_mask
from ._reader import Reader as Reader
from ._reader import Section as Section
from ._symbols import Coder as Coder
from ._symbols import Stream as Stream
from ._symbols import decode as decode
from ._symbols import encode as encode
from ._writer import Writer as Writer
