"""The three phases of the training guide: compressor, thinking states, and the recursion between them."""
