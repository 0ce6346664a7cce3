"""plan (headers only) -> stream -> commit, for every workflow that writes tensors.

`plan` says what each output tensor is made of, `segments` cuts that into pieces of work that any
worker can do alone, `stream` does them in bounded memory, `commit` puts files beside them and
publishes the whole.
"""
