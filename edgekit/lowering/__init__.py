"""Lowering: the same graph in operators that an older parser has, proven by ONNX Runtime.

tables.for_profile(profile)       what the profile's parser takes, from the published operator lists
lower(model, table)               the graph rewritten for it, and what was changed
prove(model, lowered, examples)   the largest difference between the two, computed
"""
