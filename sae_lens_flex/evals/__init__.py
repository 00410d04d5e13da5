"""How well SAEs reconstruct at each budget, and which budget to choose."""

from .calibration import mean_budget
from .choice import smallest_budget
from .metrics import BudgetMetrics, BudgetSweep
from .sweep import sweep_budgets

__all__ = ["BudgetMetrics", "BudgetSweep", "mean_budget", "smallest_budget", "sweep_budgets"]
