"""What this machine can do, looked up or tried. What goes wrong is a finding too; nothing here raises."""

from pdvit.engine.doctor.findings import Finding, Findings, reason
from pdvit.engine.doctor.machine import backends, cpu, extras, gpus, place, versions
from pdvit.engine.doctor.trials import compilation, precisions

__all__ = [
    "Finding",
    "Findings",
    "backends",
    "compilation",
    "cpu",
    "extras",
    "gpus",
    "place",
    "precisions",
    "reason",
    "versions",
]
