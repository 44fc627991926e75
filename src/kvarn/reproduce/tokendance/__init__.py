"""TokenDance: agents in rounds that read the same texts behind different histories (arXiv 2604.03143)."""
