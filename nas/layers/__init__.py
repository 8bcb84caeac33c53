"""Searching for layers: anchor networks and the tests that a layer must pass before it is trained at length."""
