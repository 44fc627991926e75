"""Workloads, reports and pictures of runs, real or simulated."""
