"""Training-free scores of many architectures: workers, cache, correlation with a table, searches steered by them."""

from nas.scoring.many import ScoreTable, score_architectures
from nas.scoring.task import ScoringTask

__all__ = ["ScoreTable", "ScoringTask", "score_architectures"]
