"""Scoring on tasks of the LM evaluation harness, and training rows rendered by the very same templates."""

from fedproxy.evaluation.harness import evaluate, harness_model
from fedproxy.evaluation.loading import load_for_evaluation
from fedproxy.evaluation.rendering import training_rows

__all__ = ["evaluate", "harness_model", "load_for_evaluation", "training_rows"]
