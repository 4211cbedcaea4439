"""From a folder of documents to passages to ask about, and from a model's answers to rows to learn from.

:mod:`~llm_ray.documents.read` finds the files and reads each as blocks of text that know their line or page
(:mod:`~llm_ray.documents.markdown`, :mod:`~llm_ray.documents.html`, :mod:`~llm_ray.documents.pdf`),
:mod:`~llm_ray.documents.passages` makes passages of them, :mod:`~llm_ray.documents.rows` the request for questions and
answers and rows of what comes back, :mod:`~llm_ray.documents.support` and :mod:`~llm_ray.documents.repeats` say which
rows are kept, and :mod:`~llm_ray.documents.log` keeps the answers from one run of the command to the next.
"""
