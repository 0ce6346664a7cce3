"""Making a graph of a merged checkpoint, with torch and transformers or a runtime's own builder.

`exporter` alone knows transformers' young exporter; `found` proves that every weight arrived.
"""
