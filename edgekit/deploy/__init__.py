"""Bringing a bundle to devices."""
