"""The agent follows tags in OCI registries: for fleets that can reach a registry and cannot be reached."""
