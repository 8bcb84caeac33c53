"""Neural predictors: stacked networks on dense padded graphs, one training loop, pre-training."""
