"""Recovery: training of a pruned model by transformers' Trainer, with every zero kept."""
