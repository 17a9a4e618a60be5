"""Experts in 4 bits (their head in 2), in 8, or as they are: layout, quantizer, codec."""
