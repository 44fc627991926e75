"""kvarn: train, compress, serve and simulate neural networks where memory and links are the bottleneck."""

__version__ = "0.1.0"
