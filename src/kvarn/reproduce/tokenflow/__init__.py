"""TokenFlow (arXiv 2510.02758): streaming under bursts, its evaluation on a virtual clock."""
