"""Pictures, tables and a page about a run. Needs ``pip install 'gatewright[train]'``."""

from gatewright.report.comparison import Comparison, MeasuredRun
from gatewright.report.page import write_report
from gatewright.report.pictures import write_all, write_pictures
from gatewright.report.plots import (
    plot_class_by_expert,
    plot_comparison,
    plot_confusion,
    plot_groups,
    plot_load_over_time,
    plot_training_curves,
)
from gatewright.report.tables import comparison_table, expert_table, plain_table, result_table

__all__ = [
    "Comparison",
    "MeasuredRun",
    "comparison_table",
    "expert_table",
    "plain_table",
    "plot_class_by_expert",
    "plot_comparison",
    "plot_confusion",
    "plot_groups",
    "plot_load_over_time",
    "plot_training_curves",
    "result_table",
    "write_all",
    "write_pictures",
    "write_report",
]
