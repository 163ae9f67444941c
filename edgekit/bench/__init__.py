"""Latency and throughput of a finished bundle: ``edgekit bench``."""
