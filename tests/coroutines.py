"""Coroutines in tests."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def in_thread(call: Callable[[], Any]) -> Any:
    """Of a function run in a thread, because a browser that an earlier test opened has an event loop in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def result_of(call: Coroutine) -> Any:
    return in_thread(lambda: asyncio.run(call))
