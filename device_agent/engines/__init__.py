"""Engines: one file a runtime, behind one small interface."""
