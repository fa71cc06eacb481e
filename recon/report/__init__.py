"""A page that explains a result: what was found, whether it fits the data, how sure one may be, and how to get it again."""

from __future__ import annotations

from recon.report.evidence import Evidence
from recon.report.page import write_report
from recon.report.upstream import affordable_bands, affordable_split, examined

__all__ = ["Evidence", "affordable_bands", "affordable_split", "examined", "write_report"]
