"""A decoder from scratch that learns to add, with a chain of thought: data, training, evaluation, chat."""
