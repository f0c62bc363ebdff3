"""What MEND, MALMEN and RLEdit share: networks that turn keys and gradients into a weight update."""
