"""``report.json`` and what people read from it."""
