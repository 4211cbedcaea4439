"""Exceptions with messages written for the user.

Every exception that a user may see derives from :class:`LlmRayError`; the command line turns it into one message
and an exit code at a single place (``llm_ray.cli.main``). A message names the file and key (or host and variable),
what is wrong, and what to do about it.
"""

from __future__ import annotations


class LlmRayError(Exception):
    """The work failed; the message says why and what to do. Exit code 1."""

    exit_code = 1


class ConfError(LlmRayError):
    """The conf (or a flag) is wrong: nothing was started. Exit code 2, incorrect use."""

    exit_code = 2


class DataError(LlmRayError):
    """A data file or a row of it cannot be used; the message names file and line."""


class ModelError(LlmRayError):
    """A model or tokenizer is missing, incomplete or unsupported."""


class RunError(LlmRayError):
    """A run's folder is in a state that rules out the request (exists already, nothing to resume, …)."""


class ClusterError(LlmRayError):
    """Ray could not be started or joined, or the cluster lacks resources the conf asks for."""


class TrainError(LlmRayError):
    """Training failed: a lost worker, a NaN loss, a full disk, no memory."""


class Stopped(TrainError):
    """A run was stopped on request: the same command resumes it."""

    exit_code = 130


class ServeError(LlmRayError):
    """A model could not be deployed, or a deployed model did not answer."""
