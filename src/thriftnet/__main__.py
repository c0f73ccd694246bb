"""`python -m thriftnet`, and the command `thriftnet`."""

import os
import sys

from thriftnet import cli


def main() -> int:
    """Run the command line; one of several processes ends here, without the interpreter's own ending.

    `DistributedDataParallel` keeps the threads of gloo alive, and one that still drops its last tensor while the interpreter is
    taken down aborts the process, though all work is done (pytorch/pytorch pull request 179291).
    """
    for handle in range(3):  # else a file that is opened takes the place of a closed standard stream, and its output
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    code = cli.main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(code)  # all output is flushed
    return code


if __name__ == "__main__":
    sys.exit(main())
