"""Image data sets as tensors: `load_data(name)` for digits, CIFAR, image folders and a user's own objects."""

from nas.training.data.dataset import Dataset, Split, load_data, stratified_split

__all__ = ["Dataset", "Split", "load_data", "stratified_split"]
