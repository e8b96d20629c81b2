"""Connections lent to a thread in C, which reads common requests, and refuses what is too many.

Python's thread is the narrowest place of a server whose model takes next to nothing. What comes on
a lent connection costs it nothing until it has time for it, and what it will have no time for is
refused without it. Whatever is not a whole request with a head that came before is given back
together with the connection. Where the part in C (`_front.c`) was not built, the event loop reads
and refuses by itself.

Knows heads and room, not what is asked nor who answers.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Protocol

from mlflow_pt_deploy.serving.heads import Head, written
from mlflow_pt_deploy.serving.http.mlflow_protocol import DEADLINE_HEADER
from mlflow_pt_deploy.serving.quick import Quick

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving._front import Front as Native

_MOST_HEADS = 1024  # as in _front.c
_MOST_KINDS = 16
_NO_LIMIT = 2**31 - 1
# Where none may wait, nothing that comes would have it looked at again.
_SOON_S = 0.002
# While all streams compute, requests wait outside until one of them has answers, at most so long:
# to read several at a time, and to send answers in the same breath, costs less.
_HOLD_S = 0.005
# A connection that came back so often is lent after 2 to the power of this many known heads.
_MOST_BACKS = 10


def open_front(
    quick: Quick, headers: Callable[[], Iterable[tuple[bytes, bytes]]], most: int = 1024
) -> Front | None:
    """A front in the running loop; None where there cannot be one, see `missing`.

    Args:
        quick: Who answers.
        headers: Asked for the headers of every answer.
        most: How many connections may be lent at a time.
    """
    native = _native()
    return None if native is None else Front(native(), quick, headers, most)


def missing() -> str:
    """What to say where this system could have the part in C, and has not; else nothing."""
    if not sys.platform.startswith("linux") or _native() is not None:
        return ""
    return (
        "Requests are read in Python, since the part in C was not built; for more of them, "
        "install mlflow-pt-deploy again where there are a C compiler and Python's headers."
    )


def _native() -> type[Native] | None:
    try:
        from mlflow_pt_deploy.serving import _front
    except ImportError:
        return None
    return _front.Front


class Borrowed(Protocol):
    """A connection, told what came on it while it was lent."""

    def lent_request(self, data: bytes, since: float) -> None:
        """A whole request with a head that was made known; read then, by `time.perf_counter`."""

    def given_back(self, data: bytes) -> None:
        """It is lent no more; this was read on it last."""


class Front:
    """What the thread knows, and what it has read.

    Requests of a kind, by their path and deadline, are refused together. When there are more than
    `_MOST_KINDS` of them, or `_MOST_HEADS` heads, all are forgotten, and learned anew.
    """

    def __init__(
        self,
        native: Native,
        quick: Quick,
        headers: Callable[[], Iterable[tuple[bytes, bytes]]],
        most: int,
    ) -> None:
        self._native, self._quick, self._headers, self._most = native, quick, headers, most
        self._names = count()
        self._loans: dict[int, Loan] = {}
        self._recalled: list[int] = []
        self._looking = self._held = False
        self._known: set[bytes] = set()
        self._kinds: list[tuple[bytes, bytes | None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(native.fileno(), self._look)
        quick.listen(self._changed)

    def close(self) -> None:
        """Recall all connections and end the thread."""
        for loan in list(self._loans.values()):
            if loan.lent:
                loan.recall()
        self._loop.remove_reader(self._native.fileno())
        if self._timer is not None:
            self._timer.cancel()
        self._native.close()

    def know(self, head: Head) -> None:
        """Make a head known, on whichever connection it comes."""
        if head.text in self._known:
            return
        kind = head.url, head.fields.get(DEADLINE_HEADER)
        new = kind not in self._kinds
        if len(self._known) >= _MOST_HEADS or (new and len(self._kinds) >= _MOST_KINDS):
            self._tell_refused(self._native.forget())  # by the kinds of before
            self._known.clear()
            self._kinds.clear()
        if kind not in self._kinds:
            self._kinds.append(kind)
            self._make_room()
        self._known.add(head.text)
        self._native.know(head.text, head.length, self._kinds.index(kind))

    def lend(self, loan: Loan, fd: int, busy: bool) -> tuple[int, int] | None:
        """Lend a connection: its slot and its name; None: too many are lent."""
        if len(self._loans) >= self._most:
            return None
        name = next(self._names)
        slot = self._native.lend(fd, name, busy)
        self._loans[name] = loan
        return slot, name

    def recall(self, slot: int, name: int) -> float:
        """Lend it no more; when it was heard last. What was read before is handed on at once."""
        heard = self._native.recall(slot)
        self._recalled.append(name)
        self._look()
        return heard

    def heard(self, slot: int) -> float:
        """When a request came on a connection last, by `time.perf_counter`."""
        return self._native.heard(slot)

    def answer(self, slot: int, data: bytes) -> bytes:
        """Write on a connection; what of it could not be sent at once."""
        return data[self._native.answer(slot, data) :]

    def _changed(self) -> None:
        """Something was begun, or has been answered."""
        held, self._held = self._held, self._quick.full
        if held != self._held:
            self._native.hold(_HOLD_S if self._held else 0.0)
        if not (held and self._look()):  # whose end is a change, too
            self._make_room()

    def _look(self) -> bool:
        """Hand on what has been read, in its order; whether a turn was begun and ended with it.

        Whoever is told may recall connections: what was read on those before comes with the next
        look, and only then are they forgotten.
        """
        if self._looking:
            return False
        self._looking = again = True
        turned = False
        try:
            while again:
                recalled, self._recalled = self._recalled, []
                came, refused = self._native.take()
                self._tell_refused(refused)
                turned |= self._tell(came)
                for name in recalled:
                    del self._loans[name]
                again = bool(self._recalled)
        finally:
            self._looking = False
        return turned

    def _tell(self, came: Sequence[tuple[int, bytes, float]]) -> bool:
        """Hand on what came; whether its requests were a turn, since no other had begun."""
        mine = any(since for _, _, since in came) and self._quick.begin_turn()
        try:
            for name, data, since in came:
                self._loans[name].tell(data, since)
        finally:
            if mine:
                self._quick.end_turn()
        return mine

    def _tell_refused(self, refused: Iterable[tuple[int, int]]) -> None:
        for kind, number in refused:
            self._quick.tell_refused(self._kinds[kind][0], number)

    def _make_room(self) -> None:
        """Say how many requests may wait, and what to tell the others; soon again if none may."""
        full = False
        for kind, (path, deadline) in enumerate(self._kinds):
            limit = self._quick.room(path, deadline)
            if limit is None:
                self._native.room(kind, _NO_LIMIT, _NO_LIMIT, b"")
                continue
            coming = int(min(limit.coming, _NO_LIMIT))
            refusal = written(limit.refusal, True, self._headers())
            self._native.room(kind, limit.waiting, coming, refusal)
            full = full or not (limit.waiting and coming)
        if full and self._timer is None:
            self._timer = self._loop.call_later(_SOON_S, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._look()
        self._make_room()


class Loan:
    """A connection that is lent again and again, less often the more often it came back.

    Args:
        front: Whom it is lent to.
        connection: Told what comes.
        transport: Of that connection; its reading is paused while it is lent.
    """

    def __init__(self, front: Front, connection: Borrowed, transport: asyncio.Transport) -> None:
        self._front, self._connection, self._transport = front, connection, transport
        self._lent: tuple[int, int] | None = None
        self._known = self._backs = 0

    @property
    def lent(self) -> bool:
        """Whether it is at present."""
        return self._lent is not None

    def lend(self, head: Head, busy: bool) -> None:
        """Lend it after a known head came, if that is worth it.

        Args:
            head: What came.
            busy: Whether an answer to it is still to come.
        """
        self._front.know(head)
        self._known += 1
        if self._known < 2**self._backs or self.lent or self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size():
            return
        fd = self._transport.get_extra_info("socket").fileno()
        self._lent = self._front.lend(self, fd, busy)
        if self.lent:
            self._transport.pause_reading()

    def recall(self) -> float:
        """End the loan; when the connection was heard last, by `time.perf_counter`."""
        assert self._lent is not None
        lent, self._lent = self._lent, None
        heard = self._front.recall(*lent)
        if not self._transport.is_closing():
            self._transport.resume_reading()
        return heard

    def heard_s(self) -> float:
        """The same without ending it."""
        assert self._lent is not None
        return self._front.heard(self._lent[0])

    def answer(self, data: bytes) -> bytes:
        """Write while it is lent; what of it could not be sent at once."""
        assert self._lent is not None
        return self._front.answer(self._lent[0], data)

    def tell(self, data: bytes, since: float) -> None:
        """What came: a request, or with `since` 0 something else, and with it the connection."""
        try:
            if since:
                self._connection.lent_request(data, since)
                return
            self._known, self._backs = 0, min(self._backs + 1, _MOST_BACKS)
            self._connection.given_back(data)
        except Exception as error:  # of one connection; what came on others is told next
            about = {"message": "a connection failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(about)
            self._transport.abort()
