"""The reference torch implementation of Bone, BAT and mini: the layer, the model, the functions.

`functional` and the modules of a variant's name are the math, `linear` is the layer that wraps a
linear one, `model` adapts a whole model.
"""

from boneconv.nn.linear import BoneLinear
from boneconv.nn.model.bone_model import BoneModel
from boneconv.nn.updates import Update

__all__ = ["BoneLinear", "BoneModel", "Update"]
