"""tools/report.py: one HTML page about training runs."""
