"""The chains: quantize and keep the proof of it, measure against a reference, export.

Each takes values and paths, calls the rooms downstairs in order, and returns what was found; what
is shown of it is the command line's affair.
"""

from halfbyte.workflows.evaluating import Trial
from halfbyte.workflows.making import Artefact, export_gguf, quantize

__all__ = ["Artefact", "Trial", "export_gguf", "quantize"]
