"""Aliases move together: after a crash at any step, and if two promotions run at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from tiny.artifact import SAVED

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.errors import TrackingError
from mlflow_pt_deploy.registry.aliases import PENDING_PREFIX, Plan, alias_move, placement, repair
from mlflow_pt_deploy.registry.history import Event, read_history
from mlflow_pt_deploy.registry.promotion import Candidate, promote, rollback

CHANGES = (
    "create_registered_model",
    "set_registered_model_tag",
    "delete_registered_model_tag",
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "update_model_version",
    "set_model_version_tag",
)


def logged(name: str = "tiny") -> str:
    with mlflow.start_run():
        return f"models:/{flavor.log_model(SAVED / 'variant', name).model_id}"


def candidate(uri: str, text: str = "why") -> Candidate:
    return Candidate(uri, text, {"accuracy": "0.9"}, {"accuracy": 0.9})


def aliases(name: str = "shop") -> dict[str, str | None]:
    return placement(MlflowClient().get_registered_model(name))


def pending(name: str = "shop") -> list[str]:
    tags = MlflowClient().get_registered_model(name).tags
    return [key for key in tags if key.startswith(PENDING_PREFIX)]


@contextmanager
def registry_dies(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[list[str]]:
    """The `step`-th change of the registry and all later ones fail, as if the process had died."""
    done: list[str] = []
    with monkeypatch.context() as patch:
        for name in CHANGES:
            real = getattr(MlflowClient, name)

            def change(self: MlflowClient, *args: object, real: Any = real, **more: object) -> Any:
                if len(done) >= step:
                    raise MlflowException("the registry is down")
                done.append(real.__name__)
                return real(self, *args, **more)

            patch.setattr(MlflowClient, name, change)
        yield done


def test_a_promotion_that_dies_at_any_step_is_finished_or_undone(
    tracking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, other = logged(), logged("b"), logged("c")
    promote(candidate(first), "shop", "the first", challenger=candidate(other))
    before = aliases()
    steps, outcomes = 0, set()
    while True:
        with registry_dies(monkeypatch, steps) as done:
            try:
                promote(candidate(second), "shop", "faster", baseline=candidate(first))
            except TrackingError:
                finished = False
            else:
                finished = True
        if finished:
            break
        assert len(done) == steps
        sentences = repair("shop")
        assert not pending()
        now = aliases()
        promoted = {**before, "champion": "3", "previous": "1"}
        assert now in (before, promoted), (steps, done, sentences)
        events = [event.after for event in read_history("shop").events]
        assert events.count("3") == (now == promoted), (steps, done)
        outcomes.add(now == promoted)
        if now == promoted:
            rollback("shop")
            client = MlflowClient()  # as it was
            client.delete_registered_model_alias("shop", "previous")
            for key in client.get_registered_model("shop").tags:
                if key.startswith("pt_deploy.event."):
                    client.delete_registered_model_tag("shop", key)
        steps += 1
    assert steps > 10
    assert outcomes == {False, True}  # some steps were undone, some finished
    assert aliases()["champion"] == "3"


DIES = """
import os, sys
from mlflow import MlflowClient
from mlflow_pt_deploy.registry.promotion import Candidate, promote
real = MlflowClient.set_registered_model_alias
def moved(self, name, alias, version):
    real(self, name, alias, version)
    if alias == "champion":
        os.kill(os.getpid(), 9)
MlflowClient.set_registered_model_alias = moved
promote(Candidate(sys.argv[1], "why"), "shop", "faster")
"""


def test_a_killed_promotion_is_repaired_by_the_command(tracking: str) -> None:
    promote(candidate(logged()), "shop", "the first")
    killed = subprocess.run([sys.executable, "-c", DIES, logged("b")], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert aliases()["champion"] == "2"
    with pytest.raises(TrackingError, match=r"was interrupted. Nothing .*--repair shop"):
        rollback("shop")
    assert repair("shop") == ["shop: the promotion of version 2 was finished."]
    assert [event.after for event in read_history("shop").events] == ["1", "2"]
    assert rollback("shop").version == "1"
    assert repair("shop") == []


def test_two_promotions_at_once_do_not_mix(tracking: str) -> None:
    models = [logged(str(number)) for number in range(4)]
    promote(candidate(models[0]), "shop", "the first")
    results: list[object] = []

    def run(uri: str, challenger: str) -> None:
        try:
            done = promote(candidate(uri), "shop", "why", challenger=candidate(challenger))
            results.append((done.version, done.challenger))
        except TrackingError as error:
            results.append(str(error))

    pairs = ((models[1], models[2]), (models[2], models[3]))
    threads = [threading.Thread(target=run, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert not pending()
    now = aliases()
    assert (now["champion"], now["challenger"]) in results, results
    errors = [each for each in results if isinstance(each, str)]
    assert all("is under way" in each or "moved meanwhile" in each for each in errors)
    assert len(read_history("shop").events) == 1 + 2 - len(errors)


def test_an_alias_that_someone_moved_meanwhile_stops_the_move(tracking: str) -> None:
    first, second = logged(), logged("b")
    promote(candidate(first), "shop", "the first")
    promote(candidate(second), "shop", "the second")
    client = MlflowClient()
    with (
        pytest.raises(TrackingError, match="an alias of shop was moved meanwhile"),
        alias_move(client, "shop") as move,
    ):
        client.set_registered_model_alias("shop", "champion", "1")
        move({"champion": "2"}, Event("promote", "1", "2", "why", "me", "now"))
    assert aliases()["champion"] == "1"
    assert not pending()
    with pytest.raises(TrackingError, match="champion of shop was moved to version 1 meanwhile"):
        promote(candidate(second), "shop", "again", instead_of="2")
    assert not pending()


def test_a_plan_whose_champion_was_moved_by_hand_leaves_the_aliases(tracking: str) -> None:
    for text in "abc":
        promote(candidate(logged(text)), "shop", text)
    client, before = MlflowClient(), aliases()
    plan = Plan(f"{PENDING_PREFIX}x", 0.0, {"champion": "1"}, {"champion": "2"}, None)
    client.set_registered_model_tag("shop", plan.key, plan.to_tag())
    assert repair("shop") == ["shop: champion was moved to version 3 meanwhile; the aliases stay."]
    client.set_registered_model_tag("shop", f"{PENDING_PREFIX}y", "not json")
    assert repair("shop") == ["shop: a promotion that had not moved an alias was removed."]
    assert aliases() == before


def test_repair_of_a_model_that_does_not_exist(tracking: str) -> None:
    with pytest.raises(TrackingError, match="none cannot be repaired"):
        repair("none")
