"""Answering few-shot tasks: the classifier, task lists, accuracy, methods."""
