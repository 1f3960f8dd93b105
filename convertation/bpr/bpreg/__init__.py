"""Body part regression, inference only: tell which part of the body a CT series shows.

    slices = preprocess(volume, spacing)
    scores = ...                                  # one per slice, by the network
    tag(scores, spacing[2], Settings.read(path))  # "CHEST"

The method, its constants and the name are those of `bpreg`, MIC-DKFZ/BodyPartRegression (Copyright 2020 Division of
Medical Image Computing, German Cancer Research Center; Apache License 2.0;
https://github.com/MIC-DKFZ/BodyPartRegression; Schuhegger 2021, arXiv 2110.09148). This is a separate, smaller
implementation that needs NumPy alone and gives the same slices and tags.
"""

from .preprocess import preprocess
from .tag import Reading, Settings, read, tag

__all__ = ["Reading", "Settings", "preprocess", "read", "tag"]
