"""Accuracy, latency and memory, measured on the artifact that ships."""
