"""Local copies of served versions: whole or not there, private, checked, one for each URI."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import mlflow
import pytest
from tiny.serving import save_tiny

from mlflow_pt_deploy.errors import ArtifactError, PtDeployError, TrackingError
from mlflow_pt_deploy.registry.addresses import DIGEST_TAG, ResolvedVersion
from mlflow_pt_deploy.registry.mlmodel import MANIFEST, digest
from mlflow_pt_deploy.registry.served_copy import ServedCopies, ServedCopy
from mlflow_pt_deploy.system.paths import home

URI = "models:/tiny@champion"
ONE, TWO = (ResolvedVersion(f"models:/tiny/{number}", "tiny", number) for number in ("1", "2"))


@pytest.fixture
def copies() -> ServedCopies:
    return ServedCopies(lambda: "http://registry")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny", label="one")


def found(copies: ServedCopies, uri: str = URI) -> ServedCopy:
    copy = copies.find(uri)
    assert copy is not None
    return copy


def folders() -> list[Path]:
    return [path for path in (home() / "served").glob("*/*") if path.is_dir()]


def test_a_copy_is_found_and_fetched(copies: ServedCopies, model: Path, tmp_path: Path) -> None:
    assert copies.find(URI) is None
    tags = {DIGEST_TAG: digest(model), "latency_p50_ms": "0.5"}
    copies.keep(URI, ONE, model, tags)
    copy = found(ServedCopies(lambda: "http://registry"))
    assert (copy.version, copy.tags) == (ONE, tags)
    assert copy.kept_at.startswith("20")
    fetched = copy.fetch(ONE, tmp_path)
    assert fetched.tags == tags
    assert (fetched.root / "habits.json").read_text() == '{"label": "one"}'


def test_files_are_linked_where_possible_and_only_the_user_reads_them(
    copies: ServedCopies, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies.keep(URI, ONE, model, {})
    (folder,) = folders()
    assert (home() / "served").stat().st_mode & 0o777 == 0o700
    assert (folder / MANIFEST).stat().st_ino == (model / MANIFEST).stat().st_ino

    def fail(*_: object, **__: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    copies.keep(URI, TWO, model, {})
    (folder,) = folders()
    assert (folder / MANIFEST).stat().st_ino != (model / MANIFEST).stat().st_ino
    assert found(copies).fetch(TWO, tmp_path).mlmodel


def test_the_old_copy_is_removed_after_the_new_one_is_whole(
    copies: ServedCopies, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies.keep(URI, ONE, model, {})

    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            copies.keep(URI, TWO, model, {})
    assert found(copies).version == ONE
    assert len(folders()) == 1
    copies.keep(URI, TWO, model, {})
    assert found(copies).version == TWO
    assert len(folders()) == 1


def test_the_same_version_is_copied_once_by_many_workers(
    copies: ServedCopies, model: Path, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", label="two")

    def work(number: int) -> None:
        copies.keep(URI, (ONE, TWO)[number % 2], (model, other)[number % 2], {})
        (tmp_path / str(number)).mkdir()
        with suppress(TrackingError):  # another one replaced it
            found(copies).fetch(ONE, tmp_path / str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))
    assert len(folders()) == 1
    copies.keep(URI, ONE, model, {})
    before = folders()
    copies.keep(URI, ONE, model, {"note": "another"})
    assert folders() == before


def test_copies_of_other_uris_and_registries_are_others(
    tracking: str, copies: ServedCopies, model: Path
) -> None:
    copies.keep(URI, ONE, model, {})
    assert copies.find("models:/tiny/1") is None
    assert ServedCopies(lambda: "http://another").find(URI) is None
    assert ServedCopies().find(URI) is None
    mlflow.set_registry_uri("http://me:secret@registry")
    assert ServedCopies().find(URI) is not None, "a password does not tell registries apart"


@pytest.mark.parametrize("uri", ["/a/folder", "folder", "file:///a/folder"])
def test_a_folder_needs_no_copy(copies: ServedCopies, model: Path, uri: str) -> None:
    copies.keep(uri, ResolvedVersion(uri), model, {})
    assert copies.find(uri) is None
    assert not (home() / "served").exists()


def test_a_link_in_a_model_is_not_copied(copies: ServedCopies, model: Path) -> None:
    (model / "secret").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="secret is not a regular file"):
        copies.keep(URI, ONE, model, {})
    assert copies.find(URI) is None
    assert folders() == []


def damage_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).write_text('{"other": 1}')


def damage_mlmodel(folder: Path) -> None:
    content = (folder / "MLmodel").read_text()
    (folder / "MLmodel").unlink()
    (folder / "MLmodel").write_text(content + "# changed\n")


def remove_mlmodel(folder: Path) -> None:
    (folder / "MLmodel").unlink()


def add_link(folder: Path) -> None:
    (folder / "habits.json").unlink()
    (folder / "habits.json").symlink_to("/dev/zero")


def remove_all(folder: Path) -> None:
    folder.rename(folder.with_name("gone"))


@pytest.mark.parametrize(
    "damage", [damage_manifest, damage_mlmodel, remove_mlmodel, add_link, remove_all]
)
def test_a_damaged_copy_is_refused(
    copies: ServedCopies, model: Path, tmp_path: Path, damage: object
) -> None:
    copies.keep(URI, ONE, model, {})
    damage(*folders())  # type: ignore[operator]
    with pytest.raises(PtDeployError):
        found(copies).fetch(ONE, tmp_path)


def test_a_copy_that_is_not_the_promoted_model_is_refused(
    copies: ServedCopies, model: Path, tmp_path: Path
) -> None:
    copies.keep(URI, ONE, model, {DIGEST_TAG: "v2:" + "0" * 64})
    with pytest.raises(ArtifactError, match="differs from the promoted one"):
        found(copies).fetch(ONE, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "not readable JSON"),
        ("[]", "not the note of a copy"),
        ({"version": {"host": "x"}}, "not the note of a copy"),
        ({"more": 1}, "not the note of a copy"),
        ({"folder": "../../elsewhere"}, "names a folder elsewhere"),
        ({"folder": 3}, "names a folder elsewhere"),
    ],
    ids=str,
)
def test_a_damaged_note_is_refused(
    copies: ServedCopies, model: Path, change: object, message: str
) -> None:
    copies.keep(URI, ONE, model, {})
    (note,) = (home() / "served").glob("*/copy.json")
    whole = json.loads(note.read_text())
    note.write_text(change if isinstance(change, str) else json.dumps(whole | change))  # type: ignore[operator]
    with pytest.raises(ArtifactError, match=message):
        copies.find(URI)
    copies.keep(URI, ONE, model, {})
    assert found(copies).version == ONE


def test_a_folder_of_copies_that_others_may_write_to_is_refused(
    copies: ServedCopies, model: Path
) -> None:
    copies.keep(URI, ONE, model, {})
    (home() / "served").chmod(0o777)
    for act in (lambda: copies.find(URI), lambda: copies.keep(URI, TWO, model, {})):
        with pytest.raises(ArtifactError, match="'served' in PT_DEPLOY_HOME is not private"):
            act()


def test_a_discarded_copy_is_made_again(copies: ServedCopies, model: Path) -> None:
    copies.keep(URI, ONE, model, {})
    found(copies).discard()
    assert copies.find(URI) is None
    copies.keep(URI, ONE, model, {})
    assert found(copies).version == ONE


def places() -> list[str]:
    """URIs' last parts of the copies that are there, e.g. ``tiny-1``."""
    return sorted(place.name.rpartition("-")[0] for place in (home() / "served").iterdir())


def keep(copies: ServedCopies, root: Path, number: int, name: str = "tiny") -> None:
    """Keep a version by its number, as a server does that is given ``models:/tiny/1``."""
    uri = f"models:/{name}/{number}"
    copies.keep(uri, ResolvedVersion(uri, name, str(number)), root, {})
    for place in (home() / "served").glob(f"{name}-{number}-*"):  # clocks of files are coarse
        for each in ("copy.json", "in-use"):
            os.utime(place / each, (number, number))


def stopped_server() -> ServedCopies:
    """The copies of a server; dropped at once, as if it had ended."""
    return ServedCopies(lambda: "http://registry")


def test_the_two_copies_of_a_model_that_were_used_last_stay(model: Path) -> None:
    keep(stopped_server(), model, 1, name="other")
    for number in range(1, 5):
        keep(stopped_server(), model, number)
    assert places() == ["other-1", "tiny-3", "tiny-4"]
    assert found(stopped_server(), "models:/tiny/3").version.version == "3"


def test_copies_in_use_stay(model: Path, tmp_path: Path) -> None:
    """Two servers on one machine: the copy of the one stays while the other changes its URI."""
    server = stopped_server()
    keep(server, model, 1)
    for number in range(2, 5):
        keep(stopped_server(), model, number)
    assert places() == ["tiny-1", "tiny-3", "tiny-4"]
    assert found(server, "models:/tiny/1").fetch(ONE, tmp_path).mlmodel
    del server
    keep(stopped_server(), model, 5)
    assert places() == ["tiny-4", "tiny-5"]


def test_another_process_keeps_its_copy(model: Path) -> None:
    keep(stopped_server(), model, 1)
    program = (
        "import sys; from pathlib import Path\n"
        "from mlflow_pt_deploy.registry.addresses import ResolvedVersion\n"
        "from mlflow_pt_deploy.registry.served_copy import ServedCopies\n"
        "copies = ServedCopies(lambda: 'http://registry')\n"
        "version = ResolvedVersion('models:/tiny/1', 'tiny', '1')\n"
        "copies.keep(version.uri, version, Path(sys.argv[1]), {})\n"
        "print('serves', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stdout.readline() == "serves\n"
        for place in (home() / "served").iterdir():
            os.utime(place / "in-use", (1, 1))
        for number in (2, 3, 4):
            keep(stopped_server(), model, number)
        assert places() == ["tiny-1", "tiny-3", "tiny-4"]
        process.kill()
    keep(stopped_server(), model, 5)
    assert places() == ["tiny-4", "tiny-5"], "the lock ends with the process"


def test_a_crash_before_the_deletion_leaves_nothing_for_long(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        keep(stopped_server(), model, number)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        keep(stopped_server(), model, 3)
    assert [name for name in places() if name.startswith(".removed")] == [".removed"]
    assert stopped_server().find("models:/tiny/1") is None
    keep(stopped_server(), model, 3)
    assert places() == ["tiny-2", "tiny-3"]


def test_a_copy_that_is_read_stays(model: Path) -> None:
    for number in (1, 2):
        keep(stopped_server(), model, number)
    copy = found(stopped_server(), "models:/tiny/1")
    with (copy.place / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keep(stopped_server(), model, 3)
        assert places() == ["tiny-1", "tiny-2", "tiny-3"]


def test_a_copy_that_is_removed_while_a_server_starts_is_made_again(model: Path) -> None:
    keep(stopped_server(), model, 1)
    for number in (2, 3):
        keep(stopped_server(), model, number)
    keep(stopped_server(), model, 1)
    assert "tiny-1" in places()


def test_damaged_copies_are_removed_first(model: Path) -> None:
    keep(stopped_server(), model, 1)
    keep(stopped_server(), model, 2)
    (note,) = (home() / "served").glob("tiny-2-*/copy.json")
    note.write_text("{")
    keep(stopped_server(), model, 3)
    assert places() == ["tiny-1", "tiny-3"]


def test_what_a_crash_left_beside_a_copy_is_removed(copies: ServedCopies, model: Path) -> None:
    copies.keep(URI, ONE, model, {})
    (folder,) = folders()
    (folder.parent / "0-half").mkdir()
    copies.keep(URI, ONE, model, {})
    assert folders() == [folder]
