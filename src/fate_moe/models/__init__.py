"""The seam into transformers: the only package that knows how its models are built inside."""
