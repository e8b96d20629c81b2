"""The database that holds a study: opened, checked, and its errors in words.

Knows what goes wrong with databases; does not know what a trial is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.errors import MissingExtraError, SearchError
from mlflow_pt_deploy.search.space import Space

if TYPE_CHECKING:
    import optuna
    from optuna.storages import RDBStorage

_SPACE = "space"


@contextmanager
def open_study(name: str, url: str, space: Space, wait_s: float) -> Iterator[optuna.Study]:
    """A study, made if there is none; what goes wrong with it inside is told in words.

    Args:
        name: Of the study.
        url: Of its database, as SQLAlchemy has it.
        space: What it searches; must be what it was made with.
        wait_s: How long to wait for an SQLite file that another process has locked.

    Raises:
        SearchError: The database cannot be used, or the study has another space or other
            objectives, or is deleted meanwhile.
        MissingExtraError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "search") from error

    directions = [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]
    with _in_words(name, url), _through_our_logging():
        storage = _open(url, wait_s)
        try:
            study = optuna.create_study(
                storage=storage, study_name=name, directions=directions, load_if_exists=True
            )
            if study.directions != directions:
                raise SearchError(
                    f"study {name} has other objectives than accuracy (up) and latency (down): it "
                    "is not a search of pt-deploy. Give the search another name."
                )
            if _SPACE not in study.user_attrs and not study.get_trials(deepcopy=False):
                study.set_user_attr(_SPACE, space.record())
            with _while_it_exists(storage, name):
                check_space(study, space)
                yield study
        finally:
            storage.remove_session()
            storage.engine.dispose()


def check_space(study: optuna.Study, space: Space) -> None:
    """Make sure that a study still exists, and searches this space.

    Raises:
        SearchError: It searches another.
        KeyError: It is deleted.
    """
    stored = study.user_attrs.get(_SPACE)
    if stored != (ours := space.record()):
        differing = ", ".join(_differences(stored or {}, ours))
        raise SearchError(
            f"study {study.study_name} searches another space ({differing}). Give the same ranges "
            "to go on with it, or another name to start a new one."
        )


def _differences(stored: dict[str, Any], ours: dict[str, Any]) -> Iterator[str]:
    for kind, ranges in ours.items():
        was = stored.get(kind)
        if not (was and ranges):
            if was != ranges:
                yield f"{kind}: {'has' if was else 'has not'} been tried in it"
            continue
        for name in ranges:
            if was.get(name) != ranges[name]:
                yield f"{kind}.{name}: {was.get(name)} in it, {ranges[name]} now"


def _open(url: str, wait_s: float) -> RDBStorage:
    import sqlalchemy
    from optuna.storages import RDBStorage

    options: dict[str, Any] = {"pool_pre_ping": True}
    if sqlalchemy.make_url(url).get_backend_name() == "sqlite":
        options["connect_args"] = {"timeout": wait_s}
    try:
        engine = sqlalchemy.create_engine(url, **options)
    except ImportError as error:
        raise SearchError(
            f"{_public(url)} needs a driver that is not installed ({error.name}). Install it, or "
            "give an address such as sqlite:///study.db."
        ) from error
    tables = sqlalchemy.inspect(engine).get_table_names()
    engine.dispose()
    # Both keep their schema's version in a table of this name (mlflow#3374).
    if "alembic_version" in tables and "studies" not in tables:
        raise SearchError(
            f"{_public(url)} is the database of something else, MLflow for example, which a study "
            "would spoil. Give the search a database of its own."
        )
    for tries in (2, 1, 0):
        try:
            return RDBStorage(url, engine_kwargs=options)
        except sqlalchemy.exc.DBAPIError as error:
            # Another process makes the same tables at this moment.
            if not tries or "locked" in str(error):
                raise
            time.sleep(0.2)
        except RuntimeError as error:
            raise SearchError(f"{_public(url)} has another Optuna's tables: {error}") from error
    raise AssertionError("unreachable")


@contextmanager
def _in_words(name: str, url: str) -> Iterator[None]:
    """Turn errors of the database and its drivers into one that says what to do."""
    import optuna
    import sqlalchemy.exc

    try:
        yield
    except sqlalchemy.exc.ArgumentError as error:
        raise SearchError(
            f"study {name} is to be stored at what is no database address. Give one such as "
            "sqlite:///study.db or postgresql://user@host/database."
        ) from error
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        cause = error.__cause__ or error
        what = " ".join(str(getattr(cause, "orig", None) or cause).split()).rstrip("?.")
        cure = "Check the address, that the database runs, and that you may write to it"
        if "locked" in what:
            cure = (
                "Another process holds the file: let it finish or stop it. SQLite suits a few "
                "processes on one machine; for more, give the search a PostgreSQL address"
            )
        raise SearchError(
            f"study {name} in {_public(url)} cannot be used: {what}. {cure}; then give the same "
            "command again, which goes on where it was."
        ) from error


@contextmanager
def _while_it_exists(storage: RDBStorage, name: str) -> Iterator[None]:
    """Optuna has a KeyError without a name for records that are gone."""
    study_id = storage.get_study_id_from_name(name)
    try:
        yield
    except KeyError as error:
        try:
            storage.get_study_name_from_id(study_id)
        except KeyError:
            raise SearchError(
                f"study {name} in {_public(storage.url)} was deleted while it was searched, and "
                "with it what was tried. Start again, with a name that nobody else uses."
            ) from error
        raise


def _public(url: str) -> str:
    """The address without its password."""
    import sqlalchemy

    return sqlalchemy.make_url(url).render_as_string(hide_password=True)


@contextmanager
def _through_our_logging() -> Iterator[None]:
    """Optuna prints a line a trial to a handler of its own; ours takes its warnings instead."""
    logger = logging.getLogger("optuna")
    before = logger.level, logger.propagate, logger.handlers[:]
    logger.setLevel(logging.WARNING)
    logger.propagate, logger.handlers = True, []
    try:
        yield
    finally:
        logger.setLevel(before[0])
        logger.propagate, logger.handlers = before[1:]
