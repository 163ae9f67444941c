"""Dynamic batching: ``policy`` decides, ``latency`` learns, ``batcher`` does."""
