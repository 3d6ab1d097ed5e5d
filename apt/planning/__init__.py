"""The plan of a run: which sites are pruned, and to which pattern."""
