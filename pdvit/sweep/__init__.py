"""A [sweep] table to cells, and running those that are not finished."""

from pdvit.sweep.cells import Cell, make_cells, numbers, split
from pdvit.sweep.folder import Folder, State
from pdvit.sweep.processes import preload, run_apart, run_cells

__all__ = ["Cell", "Folder", "State", "make_cells", "numbers", "preload", "run_apart", "run_cells", "split"]
