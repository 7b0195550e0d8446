"""`python -m pdvit` and the `pdvit` command."""

import os
import sys

from pdvit.cli import run


def main() -> None:
    """Run the command line and exit with its status."""
    # Before torch is imported: threads that spin while they wait make a small model many times slower on a shared CPU.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
