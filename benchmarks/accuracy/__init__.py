"""What ``benchmarks/calibration_accuracy.py`` is made of: trained models, peers, and how they are judged."""
