"""Deployment formats of a merged ViT, imported as `lorarecycle.export`."""

if __name__ == "export":
    raise ImportError("import `lorarecycle.export`; the folder `export` is no package of its own")
