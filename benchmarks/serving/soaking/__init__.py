"""The parts of the soak: the agent and its models, its clients, good and bad, and what is watched."""
