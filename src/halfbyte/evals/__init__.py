"""Measurements of a model that runs, and the gate they pass or miss."""
