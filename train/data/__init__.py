"""What a model learns from: tasks and corpora as text, then batches of token ids."""
