"""Applications of agents that call tools: what they ask for, and what plays them against an engine."""
