"""The one reader and the one writer of PEFT adapter folders."""
