"""Pages that open from a file, without a network: the patch explorer and the report of an analysis."""

from pdvit.analysis.pages.explorer import explorer_page, room
from pdvit.analysis.pages.report import Picture, report_page

__all__ = ["Picture", "explorer_page", "report_page", "room"]
