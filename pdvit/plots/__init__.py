"""Figures from the files of run directories; imports no torch."""
