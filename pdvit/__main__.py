"""`python -m pdvit` and the `pdvit` command."""

import sys


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        from pdvit.cli import run
    except KeyboardInterrupt:  # before anything has begun
        sys.exit(130)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
