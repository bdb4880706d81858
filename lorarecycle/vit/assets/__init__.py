"""The small ViT that comes with the package, `Backbone.load("demo")`."""
