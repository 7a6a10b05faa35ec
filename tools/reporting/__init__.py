"""The parts of tools/report.py: runs as read from their folders, what their models get wrong, the page."""
