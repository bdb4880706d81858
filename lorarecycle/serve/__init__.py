"""A page to try a meta-LoRA, and the same answers as JSON over HTTP; needs the extra `serve`."""
