"""References to models by users: local paths, the Hugging Face Hub, embedded models."""
