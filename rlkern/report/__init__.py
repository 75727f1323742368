"""What a run has left behind, as one page; what it shows while it goes on, on a terminal.

Reads nothing but the folders of runs, and imports nothing of the trainer.
"""

from rlkern.report.page import report
from rlkern.report.records import ReportError, read_lines

__all__ = ["ReportError", "read_lines", "report"]
