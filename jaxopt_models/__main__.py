"""``python -m jaxopt_models``; the manual is in :mod:`jaxopt_models.cli`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
