"""Fast forms of the operations that torch lacks."""
