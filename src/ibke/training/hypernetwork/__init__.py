"""Training of MEND, MALMEN and RLEdit."""
