"""The model on disk: its format, how it is written, read and verified. Knows no torch."""
