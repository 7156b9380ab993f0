"""Calibrations: an importance matrix with all that codes are chosen by."""
