"""Runs code as Ray's user, for modules that become root."""

from __future__ import annotations

import contextlib
import os
import pwd


@contextlib.contextmanager
def acting_as(user):
    """Switches to Ray's user, since shared storage may be closed to root, and back to root afterwards, for Ansible's
    own files.

    Raises KeyError if there is no such user.
    """
    entry = pwd.getpwnam(user)
    if os.geteuid() != 0:
        yield
        return
    groups, mask = os.getgroups(), os.umask(0o027)
    os.setgroups(os.getgrouplist(user, entry.pw_gid))
    os.setegid(entry.pw_gid)
    os.seteuid(entry.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
        os.umask(mask)
