"""From rows of any supported format to supervised tokens on disk.

The way of a row: :mod:`~llm_ray.data.sources` reads it and knows its file and line, a processor may change or drop it,
:mod:`~llm_ray.data.formats` makes a conversation (or a text) of it, :mod:`~llm_ray.data.encode` tokens and labels,
:mod:`~llm_ray.data.prepare` writes them as Arrow files. One row after the other: no stage
holds all of them.
"""
