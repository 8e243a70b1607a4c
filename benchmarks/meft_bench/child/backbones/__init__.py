"""Backbones: transformers' classifiers of all supported families, and of any other.

These are text classifiers of every text family that the library supports, and image
classifiers of ViT.

names       from a backbone's name to a model, its tokenizer, and its origin
packages    weights that installed packages contain
files       weights on disk, as safetensors or GGUF
save        a trained model as such a folder
shapes      random weights of a named shape
quantised   linear layers with quantised weights, and which these are
any_family  models of families that the library does not know
unwrapped   transformers' model inside of PEFT's
classifier  configuration of a classifier, independent of family and origin
bart        a BART classifier that does not depend on values
"""

from meft_bench.child.backbones.classifier import (
    blocks_of,
    heads_of,
    image_shape,
    set_depth,
)
from meft_bench.child.backbones.names import (
    Backbone,
    from_config,
    load,
    load_config,
    num_blocks_of,
)
from meft_bench.child.backbones.save import save

__all__ = [
    "Backbone",
    "blocks_of",
    "from_config",
    "heads_of",
    "image_shape",
    "load",
    "load_config",
    "num_blocks_of",
    "save",
    "set_depth",
]
