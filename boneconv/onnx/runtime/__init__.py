"""One graph for many adapters: `graph` puts their terms in, `files` writes them, `session` serves.

`products` finds the matrix products of a module, `bone` and `bat` are the terms.
"""
