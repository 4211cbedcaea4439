"""The web UI: a FastAPI application with Gradio mounted in it, behind a login.

llm-ray ui

`users` and `sessions` authenticate, `guard` filters requests, `handlers` checks the role of each call, `screens` define
the content. Screens call the package's use cases; the UI contains no logic of its own.
"""
