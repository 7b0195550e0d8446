"""Sweeps: a [sweep] table to cells, and their folder."""

from pdvit.sweep.cells import Cell, make_cells, numbers, split
from pdvit.sweep.folder import CellState, Folder

__all__ = ["Cell", "CellState", "Folder", "make_cells", "numbers", "split"]
