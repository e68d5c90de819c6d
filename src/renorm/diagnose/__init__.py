"""Mistakes before training (`check`) and trouble while it runs (`watch`)."""

from renorm.diagnose.catalogue import RULES, Found, Mended, Rule, rule
from renorm.diagnose.check import check
from renorm.diagnose.finding import Finding, Fixed, Report

__all__ = ["RULES", "Finding", "Fixed", "Found", "Mended", "Report", "Rule", "check", "rule"]
