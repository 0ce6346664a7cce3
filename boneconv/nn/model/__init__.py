"""Adapting a whole model: which modules, what is trained beside them, merging, saving, loading.

`bone_model` is the public class and `adapted` its state. `targets` finds the modules that a
configuration names, `attaching` and `unloading` put layers in and take them out, `saving` and
`loading` are its files.
"""

from boneconv.nn.model.bone_model import BoneModel

__all__ = ["BoneModel"]
