"""Training on the host: one loop, used for training, distillation and recovery."""
