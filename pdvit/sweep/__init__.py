"""Sweeps: a [sweep] table to cells, their folder, and their processes."""

from pdvit.sweep.cells import Cell, make_cells, numbers, split
from pdvit.sweep.folder import CellState, Folder
from pdvit.sweep.processes import run_apart, run_cells

__all__ = ["Cell", "CellState", "Folder", "make_cells", "numbers", "run_apart", "run_cells", "split"]
