"""Complete short models, one a file, read like the paper and meant to be copied."""
