"""The page: our own FastAPI application with Gradio mounted in it, behind a login.

llm-ray ui

`users` and `sessions` say who is there, `guard` lets nobody else through, `handlers` asks for the role of each call,
`screens` hold what is shown. What a screen does it asks of the package's use cases; the page decides nothing by itself.
"""
