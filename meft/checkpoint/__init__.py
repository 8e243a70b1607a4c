"""Saving and loading of the trained tensors.

files            the two files of a directory, and reading and writing them
digests          sha256 of tensors
trained          which tensors are saved
config_file      the contents of the config file, checked
backbone         what identifies the backbone that they belong to
save             `save_adapters`
load             `load_adapters`
save_pretrained  the same when `save_pretrained`, or peft's `load_adapter`, is called
"""
