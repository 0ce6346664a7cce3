"""What `specs/make_vectors.py` writes, and how.

`tensors`, `adapters` and `cases` are what vectors are made of; `merge` and `digests` work out what
they must give; `files` and `writing` put them on disk; `valid` and `invalid` are the vectors.
"""
