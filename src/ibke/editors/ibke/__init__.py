"""The Information Bottleneck Knowledge Editor (arXiv 2512.16227)."""
