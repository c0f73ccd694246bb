"""What a network costs: stored and dense parameters, multiply-accumulates, weight generation, bytes moved by shifts."""

from thriftnet.measure.counting import inspect
from thriftnet.measure.report import LayerRow, Report

__all__ = ["LayerRow", "Report", "inspect"]
