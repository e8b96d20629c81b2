class Front:
    """The thread; see `_front.c`."""

    def know(self, head: bytes, body: int, kind: int) -> None:
        """Take requests with this head and a body of so many bytes."""

    def forget(self) -> list[tuple[int, int]]:
        """Forget all heads; how many were refused of which kind, as with `take`."""

    def room(self, kind: int, waiting: int, coming: int, refusal: bytes) -> None:
        """How many requests of a kind may wait to be taken, how many may come until this is called
        again, those that wait now among them, and what the others are told."""

    def hold(self, seconds: float) -> None:
        """Be readable for a request only so long after it came; at once for all else."""

    def lend(self, fd: int, name: int, busy: bool) -> int:
        """Read a connection from now on; returns its slot. `busy`: an answer is still to come."""

    def recall(self, slot: int) -> float:
        """Read it no more; when it was heard last, by `time.perf_counter`."""

    def heard(self, slot: int) -> float:
        """The same, and read on."""

    def answer(self, slot: int, data: bytes) -> int:
        """Write; how many bytes were sent."""

    def take(self) -> tuple[list[tuple[int, bytes, float]], list[tuple[int, int]]]:
        """What was read (a connection's name, the bytes, when; 0: it is given back), and how many
        were refused of which kind."""

    def fileno(self) -> int:
        """Readable when there is something to take."""

    def close(self) -> None:
        """End the thread."""
