"""What a model is and where it is: GGUF headers, skeletons, requantization."""
