"""`python -m thriftnet`."""

import sys

from thriftnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
