"""References of users to models: local paths, the Hugging Face Hub, embedded models."""
