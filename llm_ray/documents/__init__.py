"""Turns a folder of documents into passages, and a model's answers about them into rows of training data.

:mod:`~llm_ray.documents.read` finds the files and reads each as blocks of text with their line or page
(:mod:`~llm_ray.documents.markdown`, :mod:`~llm_ray.documents.html`, :mod:`~llm_ray.documents.pdf`).
:mod:`~llm_ray.documents.passages` groups them into passages. :mod:`~llm_ray.documents.rows` builds the requests for
questions and answers, and parses the answers into rows. :mod:`~llm_ray.documents.support` and
:mod:`~llm_ray.documents.repeats` decide which rows to keep. :mod:`~llm_ray.documents.log` stores the answers, so that
an interrupted command can continue.
"""
