"""Reports as web pages: one self-contained file each, for one plan, for two plans, and for a curve of budgets."""

from planner.page.comparison_page import comparison_page
from planner.page.curve_page import curve_page
from planner.page.plan_page import plan_page

__all__ = ["comparison_page", "curve_page", "plan_page"]
