"""The chains: quantize and keep the proof of it, measure against a reference, export.

Each takes values and paths, calls the rooms downstairs in order, and returns what was found; what
is shown of it is the command line's affair.
"""

from halfbyte.workflows.artefacts import Artefact
from halfbyte.workflows.asking import Distilling
from halfbyte.workflows.comparing import Side, compare
from halfbyte.workflows.distilling import Distilled, distill
from halfbyte.workflows.evaluating import Asked, Evaluation, Measured, Verdict
from halfbyte.workflows.exporting import Form, export
from halfbyte.workflows.making import Calibrating, quantize
from halfbyte.workflows.proving import Proof, prove_speculation
from halfbyte.workflows.reporting import Conclusion, conclude, report

__all__ = [
    "Artefact",
    "Asked",
    "Calibrating",
    "Conclusion",
    "Distilled",
    "Distilling",
    "Evaluation",
    "Form",
    "Measured",
    "Proof",
    "Side",
    "Verdict",
    "compare",
    "conclude",
    "distill",
    "export",
    "prove_speculation",
    "quantize",
    "report",
]
