"""Training-free scores and rank statistics: torch only."""
