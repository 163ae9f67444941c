"""Calibration: ranges of activations, scales, and the graphs made from them."""
