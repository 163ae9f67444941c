"""What the benchmarks of training share."""
