"""Editing methods, one file or folder each."""
