"""Models made of several graphs: which steps there are (plan.py) and one engine of them (engine.py)."""
