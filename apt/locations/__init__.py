"""Places that users name: local paths, the Hugging Face Hub, embedded models."""
