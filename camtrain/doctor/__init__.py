"""What is wrong or suspicious with data and config, said in one page before an hour of training is lost."""

from __future__ import annotations

from camtrain.doctor.check_table import CHECKS, run_checks
from camtrain.doctor.examining import Examination, Extent, examine
from camtrain.doctor.finding import Finding, Place

__all__ = ["CHECKS", "Examination", "Extent", "Finding", "Place", "examine", "run_checks"]
