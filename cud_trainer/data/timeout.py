"""A time limit on what others wrote: a chat template comes with a tokenizer, and may loop for ever."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")
# Templates take less than a millisecond; these are for machines that are busy with something else.
SECONDS, SECONDS_PER_CHAT = 60.0, 0.1


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, chats: list[list[dict]], **options: Any) -> Any:
    """What the tokenizer makes of conversations, its template in the sandbox of transformers and within a time limit.

    Raises:
        TimeoutError: when it is not done in time.
        ValueError: when the template fails.
    """
    limit = SECONDS + SECONDS_PER_CHAT * len(chats)
    try:
        return within_time(lambda: tokenizer.apply_chat_template(chats, **options), limit)
    except (ArithmeticError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(f"the chat template of the tokenizer fails: {type(error).__name__}: {error}") from None


class _Stopped(BaseException):
    """Raised in a thread whose time is over; nothing catches it by accident."""


def within_time(work: Callable[[], Result], seconds: float) -> Result:
    """What `work` returns, or raises.

    It runs in a thread of its own, so that it can be left behind wherever it is called from. It is stopped there, if it
    runs Python, as templates do.

    Raises:
        TimeoutError: when it is not done in time.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = work()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    except BaseException:  # ctrl-c
        _stop(thread)
        raise
    if thread.is_alive():
        _stop(thread)
        raise TimeoutError(f"it is not done after {seconds:g} seconds")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def _stop(thread: threading.Thread) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Stopped))
