"""axolotl's merge of a LoRA into a checkpoint, shard by shard; for benchmarks only.

    pip install --no-deps axolotl==0.19.0 colorama
    python benchmarks/axolotl_merge.py BASE LORA OUT

What it imports beyond that (torch, peft, safetensors) is installed for the other benchmarks.
"""

from __future__ import annotations

import sys

from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

merge_lora_sharded_efficient(*sys.argv[1:4])
