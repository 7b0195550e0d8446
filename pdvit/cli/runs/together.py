"""How the processes of one run end: together, and with one voice."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from pdvit.errors import RunFailed, UserError


@contextmanager
def together() -> Iterator[None]:
    """Leave the other processes at the end; an error that the main process has too is said by it alone."""
    try:
        yield
    except (UserError, RunFailed) as error:
        if "TORCHELASTIC_RUN_ID" in os.environ and _said(error):
            raise typer.Exit(2 if isinstance(error, UserError) else 1) from error
        raise
    finally:
        if "pdvit.engine.distributed" in sys.modules:
            sys.modules["pdvit.engine.distributed"].destroy_process_group()


def _said(error: Exception) -> bool:
    from pdvit.engine.distributed import said_by_main

    return said_by_main(str(error))
