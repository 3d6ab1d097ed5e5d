"""Speed and memory of models on this machine, in a process for each model."""
