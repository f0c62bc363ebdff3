"""How well an edit took: greedy answers, teacher-forced scores, and protocols that put them together."""
