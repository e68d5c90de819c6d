"""Mistakes before training (`check`) and trouble while it runs (`watch`)."""

from renorm.diagnose import callbacks
from renorm.diagnose.catalogue import RULES, Found, Mended, Rule, rule
from renorm.diagnose.check import check
from renorm.diagnose.finding import Finding, Fixed, Report
from renorm.diagnose.watch import Watch, watch
from renorm.diagnose.worst import Case, Neighbor, WorstCases, worst_cases

__all__ = [
    "RULES",
    "Case",
    "Finding",
    "Fixed",
    "Found",
    "Mended",
    "Neighbor",
    "Report",
    "Rule",
    "Watch",
    "WorstCases",
    "callbacks",
    "check",
    "rule",
    "watch",
    "worst_cases",
]
