"""GGUF files, read as if they were the Hugging Face folder they were converted from."""
