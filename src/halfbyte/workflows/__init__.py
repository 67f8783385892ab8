"""The chains: quantize and keep the proof of it, measure against a reference, export.

Each takes values and paths, calls the rooms downstairs in order, and returns what was found; what
is shown of it is the command line's affair.
"""

from halfbyte.workflows.evaluating import Asked, Measured, Trial, Verdict
from halfbyte.workflows.making import Artefact, export_gguf, quantize

__all__ = ["Artefact", "Asked", "Measured", "Trial", "Verdict", "export_gguf", "quantize"]
