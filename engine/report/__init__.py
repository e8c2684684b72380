"""Comparison of a feedback run's loops with other models, and its report on one page."""
