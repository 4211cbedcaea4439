"""What goes wrong, in words written for the user.

Every exception that a user may see derives from :class:`LlmRayError`; the command line turns it into one message
and an exit code at a single place (``llm_ray.cli.main``). A message names the file and key (or host and variable),
what is wrong, and what to do about it.
"""

from __future__ import annotations


class LlmRayError(Exception):
    """The work could not be done; the message says why and what to do. Exit code 1."""

    exit_code = 1


class ConfError(LlmRayError):
    """The conf (or a flag) is wrong: nothing was started. Exit code 2, wrong use."""

    exit_code = 2


class DataError(LlmRayError):
    """A data file or a row of it cannot be used; the message names file and line."""


class ModelError(LlmRayError):
    """A model or tokenizer is missing, incomplete, or of a kind that cannot be used."""


class RunError(LlmRayError):
    """A run's folder is in a state that forbids what was asked (exists already, nothing to resume, …)."""


class ClusterError(LlmRayError):
    """Ray could not be started or joined, or the cluster has not what the conf asks for."""


class TrainError(LlmRayError):
    """Training ended before its end: a lost worker, a NaN loss, a full disk, no memory."""


class Stopped(TrainError):
    """A run was asked to stop, and did: the same command goes on from there."""

    exit_code = 130


class ServeError(LlmRayError):
    """A model could not be deployed, or a deployed model did not answer."""
