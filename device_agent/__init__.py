"""The device agent: verifies signed bundles and serves them with dynamic batching."""

__version__ = "0.1.0"
