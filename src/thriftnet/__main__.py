"""`python -m thriftnet`, and the command `thriftnet`."""

import os
import sys

from thriftnet import cli


def main() -> int:
    """Run the command line; one of several processes ends here, without the interpreter's own ending.

    `DistributedDataParallel` keeps the threads of gloo alive, and one that still drops its last tensor while the interpreter is
    taken down aborts the process, though all work is done (pytorch/pytorch pull request 179291).
    """
    code = cli.main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
