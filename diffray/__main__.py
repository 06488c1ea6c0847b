"""`python -m diffray`: the command from a checkout, where nothing is installed."""

import sys

from diffray.command import main

if __name__ == "__main__":
    sys.exit(main())
