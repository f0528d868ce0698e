"""Studies: arms x targets x fractions x seeds, run resumably, judged by paired statistics."""

from metarec_fast.study.audit import audit_study, audit_verdict
from metarec_fast.study.grid import Arm, Cell, Comparison, Study
from metarec_fast.study.presets import PRESETS, preset
from metarec_fast.study.results import Contrast, Results, consistent
from metarec_fast.study.run import Domains, Failure, run

__all__ = [
    "PRESETS",
    "Arm",
    "Cell",
    "Comparison",
    "Contrast",
    "Domains",
    "Failure",
    "Results",
    "Study",
    "audit_study",
    "audit_verdict",
    "consistent",
    "preset",
    "run",
]
