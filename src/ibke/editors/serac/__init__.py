"""SERAC: edits in a memory, with a scope classifier before the model (arXiv 2206.06520)."""
