"""Many methods on the same edits: cells that survive an interruption, comparisons in pairs, and a page of them."""
