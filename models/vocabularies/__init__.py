"""The vocabularies that tokenizers are made of: how they are trained, and how each family's files spell them."""
