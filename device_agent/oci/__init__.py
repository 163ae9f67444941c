"""A small client of OCI registries (the distribution specification 1.1), which host and device share.

Standard library only; Python 3.8.
"""
