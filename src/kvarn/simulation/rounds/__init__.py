"""Societies of agents that work in rounds: what they are, what they say, and how they go on a simulated engine."""
