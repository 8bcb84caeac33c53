"""Measuring a trained network: accuracy, calibration, confusions, robustness, speed and memory."""

from nas.training.evaluation.attack import Attack, parse_attack
from nas.training.evaluation.measure import Evaluation, evaluate_model

__all__ = ["Attack", "Evaluation", "evaluate_model", "parse_attack"]
