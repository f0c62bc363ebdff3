"""IBKE whose edits speak only where their own question is asked (registry name ``ibke-gated``)."""
