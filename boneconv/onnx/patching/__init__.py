"""Overwriting the weights of an existing graph: jobs, values, the files, and reading them back."""
