"""The page: a FastAPI application of ours with Gradio under it, and a login in front of all of it.

llm-ray ui

`users` and `sessions` say who is there, `guard` lets nobody else through, `handlers` asks for the role of each call,
`screens` hold what is shown. What a screen does it asks of the package's use cases; the page decides nothing by itself.
"""
