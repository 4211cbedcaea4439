"""Shared by the unit tests."""

from __future__ import annotations

import os

# `engine: auto` converts models where it can. Here it cannot: tests of conversion bring a tool of their own.
os.environ["LLM_RAY_CONVERT_ENV"] = "/nowhere"
