"""Fault injection: training processes, scenarios, checks of what they leave behind, and the report."""
