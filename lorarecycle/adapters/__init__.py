"""An adapter as a value: factors, head, algebra; and PEFT's files."""
