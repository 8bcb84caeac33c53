"""Performance predictors: learn the ranking of architectures from a few measured ones."""
