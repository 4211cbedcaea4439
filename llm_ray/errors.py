"""Exceptions with messages written for the user.

Every exception that a user may see derives from :class:`LlmRayError`; the command line turns it into a message and an
exit code at a single place (``llm_ray.cli.main``). A message names the file and key (or host and variable), the
problem, and the remedy.
"""

from __future__ import annotations


class LlmRayError(Exception):
    """The work failed; the message says why and what to do. Exit code 1."""

    exit_code = 1


class ConfError(LlmRayError):
    """The conf or a flag is invalid; nothing was started. Exit code 2, incorrect use."""

    exit_code = 2


class DataError(LlmRayError):
    """A data file or one of its rows cannot be used; the message names file and line."""


class ModelError(LlmRayError):
    """A model or tokenizer is missing, incomplete or unsupported."""


class RunError(LlmRayError):
    """The state of a run's folder does not allow the request (it already exists, nothing to resume, …)."""


class ClusterError(LlmRayError):
    """Ray could not be started or joined, or the cluster lacks resources the conf asks for."""


class TrainError(LlmRayError):
    """Training failed: a lost worker, a NaN loss, a full disk, no memory."""


class Stopped(TrainError):
    """A run was stopped on request: the same command resumes it."""

    exit_code = 130


class ServeError(LlmRayError):
    """A model could not be deployed, or a deployed model did not answer."""
