"""Files: reading and writing at offsets, safetensors layouts, checkpoints, publishing, the Hub."""
