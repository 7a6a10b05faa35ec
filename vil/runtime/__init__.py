"""Modules below training, evaluation and the input pipeline; they import `vil.config` alone."""
