"""Readers of data sets, and the generator that turns facts into edit requests."""
