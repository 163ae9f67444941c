"""What the agent and systemd tell each other; it does nothing where systemd did not start it."""
