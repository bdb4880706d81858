"""Methods that few-shot tasks can be answered by, one file each."""
