"""Probation: a new version serves, and its live traffic decides whether it stays."""
