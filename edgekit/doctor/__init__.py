"""What this machine can do for edgekit, and what is missing: ``edgekit doctor``."""
