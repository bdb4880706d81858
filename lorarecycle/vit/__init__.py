"""The frozen Vision Transformer and the factors it takes."""
