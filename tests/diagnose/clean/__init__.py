"""Healthy programs: `check` has nothing to say about them, save infos."""

from program import programs

from clean import (
    agents,
    generative,
    graphs,
    precision,
    returning,
    segmentation,
    sequences,
    similarity,
    tabular,
    text,
    transfer,
    tricky,
    unusual,
    vision,
)

ALL = programs(
    vision,
    segmentation,
    text,
    sequences,
    tabular,
    graphs,
    generative,
    similarity,
    transfer,
    agents,
    precision,
    returning,
    tricky,
    unusual,
)
