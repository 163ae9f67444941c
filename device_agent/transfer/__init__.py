"""Receiving a bundle in chunks, of which only those travel that this device lacks."""
