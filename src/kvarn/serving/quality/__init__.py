"""How good answers are when shared segments are reused: measured on text, and certified for a model."""
