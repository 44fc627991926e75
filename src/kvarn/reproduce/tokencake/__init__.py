"""TokenCake (arXiv 2510.18586): what becomes of an agent's KV while its tool runs, and who gets memory first."""
