"""The frozen Vision Transformer and what it wears."""
