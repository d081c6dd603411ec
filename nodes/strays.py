"""Telling our own cancellation from one that foreign code let out.

A loader or a sink that awaits something cancelled elsewhere raises CancelledError though
nobody stopped us. Taken for ours, it would end a whole task group without a word.
"""

from __future__ import annotations

import asyncio

__all__ = ["asked_to_stop"]


def asked_to_stop(error: BaseException) -> bool:
    """Whether this must pass: an exit, or a cancellation that this task was asked for."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is None or task.cancelling() > 0
    return not isinstance(error, Exception)
