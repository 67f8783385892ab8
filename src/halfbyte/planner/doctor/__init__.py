"""The doctor: named checks over a snapshot of the machine and of a model, each with its cure.

Checks are pure functions over facts (`facts.py`, `model_facts.py`); what is asked of the machine is
asked by the probes. A new check is a function in the tuple `CHECKS` of its file, and a planted
fault in tests/planted.py. What it is not: a benchmark, or a comparison with the original
(`halfbyte eval --against`).
"""
