"""The host tool: a model, a device profile and a contract in; a signed bundle out."""

__version__ = "0.1.0"
