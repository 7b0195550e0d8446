"""`python -m pdvit` and the `pdvit` command."""

import gc
import signal
import sys


def main() -> None:
    """Run the command line and exit with its status."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        # Ends the imports, which an exception can leave half done. `raise_on_ctrl_c` changes it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.set_threshold(50_000)  # the imports make half a million objects that stay; collecting took 0.6 s of them
    from pdvit.cli import run

    status = run(sys.argv[1:])
    gc.freeze()  # at exit Python would look for cycles among them for another second
    sys.exit(status)


if __name__ == "__main__":
    main()
