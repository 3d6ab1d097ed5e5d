"""GGUF files, which llama.cpp and Ollama run: written from checkpoints, by the package gguf."""
