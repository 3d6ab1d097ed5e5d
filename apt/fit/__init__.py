"""The choice of target forms under a budget: a table of losses, and the best choice from it."""
