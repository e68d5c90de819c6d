"""Mistakes before training (`check`) and trouble while it runs (`watch`)."""

from renorm.diagnose.catalogue import RULES, Found, Mended, Rule, rule
from renorm.diagnose.check import check
from renorm.diagnose.finding import Finding, Fixed, Report
from renorm.diagnose.watch import Watch, watch

__all__ = ["RULES", "Finding", "Fixed", "Found", "Mended", "Report", "Rule", "Watch", "check", "rule", "watch"]
