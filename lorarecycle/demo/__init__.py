"""The whole job in minutes, with a model and data that come along."""
