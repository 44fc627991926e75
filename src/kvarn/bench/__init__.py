"""Measuring: the load generator behind `kvarn bench serve`, and the rates behind `kvarn bench offline`."""
