"""The seam into transformers; the only package, with `reference/`, that imports it."""
