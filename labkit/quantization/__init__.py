"""Quantizing a model: methods, calibration, checkpoint folders, and how much quality a format costs."""
