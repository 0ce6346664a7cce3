"""Behaviour: whether a candidate answers as base and adapters do, in numbers.

The reference is the base with the adapters put into it by torch, in float64 where that fits into
memory; the candidate runs in torch or in ONNX Runtime. `tolerance` states how far apart the two may
be and why. `run` is the whole of it, `prompts` what the models are asked, `loading` and `reference`
make torch's models, `torch_runner` and `onnx_runner` run them, `measures` compares.
"""

from __future__ import annotations

from boneconv.behaviour.report import BehaviourReport, BehaviourStatus
from boneconv.behaviour.run import measure_behaviour

__all__ = ["BehaviourReport", "BehaviourStatus", "measure_behaviour"]
