"""The steps of a compression, one file each; ``registry.py`` names them."""
