"""`python -m afa`, for torchrun: the same command line as `afa`."""

import sys

from afa.cli import main

if __name__ == "__main__":
    sys.exit(main())
