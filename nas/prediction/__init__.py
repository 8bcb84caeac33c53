"""Predictors on benchmarks: graphs and labels of tables, evaluation that can be resumed, reports, ranking."""
