"""Backbones: transformers' classifiers, of text of every such family of the library, of
images of ViT.

names       from a backbone's name to a model, its tokenizer, and its origin
packages    weights that installed packages carry
files       weights on disk, as safetensors or GGUF
shapes      random weights of a named shape
classifier  what is done to a classifier whatever its family and origin
bart        a classifier of our own, where transformers' looks at values
"""

from meft_bench.child.backbones.classifier import (
    blocks_of,
    heads_of,
    image_shape,
    set_depth,
)
from meft_bench.child.backbones.names import Backbone, from_config, load, load_config

__all__ = [
    "Backbone",
    "blocks_of",
    "from_config",
    "heads_of",
    "image_shape",
    "load",
    "load_config",
    "set_depth",
]
