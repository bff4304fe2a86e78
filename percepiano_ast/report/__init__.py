"""Evaluation results -> a folder that can be sent: report, comparison page, figures, tables.

``report.md`` and the self-contained ``report.html``; ``comparison.md`` and ``.html``; ``figures/`` as SVG and PNG; ``tables/``,
every table that is shown as CSV and LaTeX; and every table of results, whole, as a CSV beside them. Every sentence about a
model is made from the numbers.
"""

from percepiano_ast.report import answers, comparison, wording
from percepiano_ast.report.wording import headlines
from percepiano_ast.report.write import evaluate_files, write

__all__ = ["answers", "comparison", "evaluate_files", "headlines", "wording", "write"]
