"""Training the meta-LoRA: warm start, episodes, prototypes, the guide to follow."""
