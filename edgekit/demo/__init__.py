"""The whole road on real data, in one command."""
