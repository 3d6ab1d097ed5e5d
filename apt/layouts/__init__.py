"""How the parameters of a model lie in the tensors of a checkpoint."""
