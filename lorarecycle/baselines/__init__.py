"""Methods that LoRA Recycle is compared with."""
