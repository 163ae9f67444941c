"""How the agent serves beside its peers, on one machine, with the same models and the same client."""
