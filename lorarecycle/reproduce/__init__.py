"""The papers' experiments, in stages that run on anyone's data."""
