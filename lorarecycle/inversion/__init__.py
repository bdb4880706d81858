"""Labelled images from adapters: LoRA Inversion, painted pictures, surrogates."""
