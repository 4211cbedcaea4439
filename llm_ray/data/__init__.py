"""From rows of any supported format to supervised tokens on disk.

:mod:`~llm_ray.data.sources` reads each row with its file and line, a processor may change or drop it,
:mod:`~llm_ray.data.formats` converts it to a conversation, text, pair or rated answer, :mod:`~llm_ray.data.encode` to
tokens and labels, and :mod:`~llm_ray.data.prepare` writes these as Arrow files. Rows are streamed: no stage holds all of them.
"""
