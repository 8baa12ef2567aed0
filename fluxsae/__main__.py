"""`python -m fluxsae` is the `fluxsae` command."""

import sys

from fluxsae.cli import main

if __name__ == "__main__":
    sys.exit(main())
