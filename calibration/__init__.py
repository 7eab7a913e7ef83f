"""Calibration text: where it comes from, how it is kept apart from the held-out text, how it becomes token windows."""
