"""Tasks of language: what a causal language model is worth in them."""
