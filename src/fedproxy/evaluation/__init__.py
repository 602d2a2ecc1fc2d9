"""Scoring on tasks of the LM evaluation harness, and training rows rendered by the very same templates."""

from fedproxy.evaluation.harness import evaluate
from fedproxy.evaluation.rendering import training_rows

__all__ = ["evaluate", "training_rows"]
