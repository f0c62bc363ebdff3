"""WISE: edits in a side memory, with a router (arXiv 2405.14768)."""
