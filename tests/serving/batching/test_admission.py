"""What a turn of the event loop has time for."""

import pytest

from mlflow_pt_deploy.serving import turn as module
from mlflow_pt_deploy.serving.turn import Turn

ANSWER_S, REFUSAL_S = 70e-6, 12e-6


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1.0

    def perf_counter(self) -> float:
        return self.now


class Loop:
    """An event loop that answers and refuses, and clients who send at a rate, whatever happens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rate: float, left_s: float = 0.1) -> None:
        self.clock = Clock()
        monkeypatch.setattr(module, "time", self.clock)
        self.turn, self.rate, self.left_s = Turn(), rate, left_s
        self.since, self.answered, self.refused, self.longest_s = self.clock.now, 0, 0, 0.0

    def run(self, turns: int) -> None:
        for _ in range(turns):
            before = self.clock.now
            came = max(1, round((before - self.since) * self.rate))
            self.since = before
            taken = 0
            for _ in range(came):
                if not taken or self.turn.has_room(taken, self.left_s):
                    taken += 1
                    if taken == 1:
                        self.turn.begin()
            self.clock.now += 200e-6 + taken * ANSWER_S + (came - taken) * REFUSAL_S
            self.turn.end(taken, came - taken)
            self.answered += taken
            self.refused += came - taken
            self.longest_s = max(self.longest_s, self.clock.now - before)


def test_what_the_loop_can_bear_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch, rate=11_000)
    loop.run(2000)
    assert loop.refused == 0
    assert loop.longest_s < 0.02


@pytest.mark.parametrize("times", [1.5, 2.0, 3.0])
def test_beyond_that_turns_stay_short_and_most_of_them_is_answers(
    monkeypatch: pytest.MonkeyPatch, times: float
) -> None:
    rate = times / ANSWER_S
    loop = Loop(monkeypatch, rate)
    loop.run(200)
    start, answered = loop.clock.now, loop.answered
    loop.longest_s = 0.0
    loop.run(2000)
    seconds = loop.clock.now - start
    could = (1 - rate * REFUSAL_S) / (ANSWER_S - REFUSAL_S)
    assert 0.8 * could < (loop.answered - answered) / seconds <= could
    assert loop.longest_s < 0.005


def test_who_has_time_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch, rate=1.2 / ANSWER_S, left_s=10.0)
    loop.run(30)
    assert loop.refused == 0


def test_a_pause_of_the_machine_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch, rate=4_000)
    for pause_s in (0.02, 0.05, 0.1, 0.02) * 20:
        loop.run(100)
        loop.turn.begin()
        loop.clock.now += pause_s
        loop.turn.end(1, 0)
        if pause_s == 0.02:
            assert loop.turn.has_room(80, loop.left_s)  # all who came meanwhile
    before = loop.refused
    loop.run(2000)
    assert loop.refused == before


def test_outside_as_many_may_wait_as_fit_into_a_part_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = Loop(monkeypatch, rate=1.0)
    assert loop.turn.room(0.1) >= 512  # nothing is known yet
    for each_s in (50e-6, 10e-3, 50e-6):  # also after a pause of few answers, if some were refused
        for _ in range(10):
            loop.turn.begin()
            loop.clock.now += 2 * each_s
            loop.turn.end(2, 0, outside=1)
        assert loop.turn.room(0.1) == pytest.approx(max(1, 0.01 / each_s), rel=0.02)
    assert loop.turn.has_room(200, 0.1)  # and those inside are not fewer for it
