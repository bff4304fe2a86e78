"""Evaluation results -> a report folder: report, comparison page, figures, tables.

``report.md`` and the self-contained ``report.html``; ``comparison.md`` and ``.html``; ``figures/``
as SVG and PNG; ``tables/`` with every table of the pages as CSV and LaTeX; and every complete table
of results as a CSV. All sentences about models are generated from the numbers.
"""

from percepiano_ast.report import answers, comparison, wording
from percepiano_ast.report.wording import headlines
from percepiano_ast.report.write import evaluate_files, write

__all__ = ["answers", "comparison", "evaluate_files", "headlines", "wording", "write"]
