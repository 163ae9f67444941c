"""Make what devices install: a wheel, one executable file, a Debian package. Not part of the agent itself.

``python -m device_agent.packaging`` runs where packages are built, with pip; the results need no network.
"""
