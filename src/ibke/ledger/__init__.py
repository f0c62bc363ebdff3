"""Every edit ever made, what it changed, and how to take it back."""

from ibke.ledger.ledger import Entry, Event, Ledger

__all__ = ["Entry", "Event", "Ledger"]
