"""What a run found, for people: a page, terminal tables, and the figures that both are made of."""

from fedproxy.reporting.attacks import attack_tables
from fedproxy.reporting.comparison import compare_runs
from fedproxy.reporting.methods import is_comparison, report_comparison
from fedproxy.reporting.page import report
from fedproxy.reporting.tables import hindrances_table, results_table, totals_table, validation_table
from fedproxy.reporting.use_it import use_it

__all__ = [
    "attack_tables",
    "compare_runs",
    "hindrances_table",
    "is_comparison",
    "report",
    "report_comparison",
    "results_table",
    "totals_table",
    "use_it",
    "validation_table",
]
