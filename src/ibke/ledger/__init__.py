"""Every edit ever made, what it changed, and how to take it back."""

from ibke.ledger.ledger import Ledger
from ibke.ledger.records import Entry, Event

__all__ = ["Entry", "Event", "Ledger"]
