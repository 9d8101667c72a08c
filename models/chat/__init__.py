"""Chat templates: programs that come with a model, rendered where they can do no harm."""
