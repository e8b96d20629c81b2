"""Study database: open and check a study, and translate database errors into `SearchError`."""

from __future__ import annotations

import logging
import threading
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
_migration_lock = threading.Lock()


@contextmanager
def open_study(name: str, url: str, space: Space, wait_s: float) -> Iterator[optuna.Study]:
    """Open a study, or create it; database errors inside the block become `SearchError`.

    Args:
        name: Name of the study.
        url: SQLAlchemy URL of the database.
        space: Search space; must equal that of an existing study.
        wait_s: Seconds to wait for an SQLite file that another process has locked.

    Raises:
        SearchError: The database cannot be used, the study has another space or other objectives,
            or the study was deleted.
        MissingExtraError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "search") from error

    directions = [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]
    with _translate_errors(name, url), _redirect_optuna_logging():
        storage = _open_storage(url, wait_s)
        try:
            study = optuna.create_study(
                storage=storage, study_name=name, directions=directions, load_if_exists=True
            )
            if study.directions != directions:
                raise SearchError(
                    f"study {name} has other objectives than accuracy and latency; pt-deploy did "
                    "not create it. Give the search another name."
                )
            if _SPACE not in study.user_attrs and not study.get_trials(deepcopy=False):
                study.set_user_attr(_SPACE, space.record())
            with _detect_deletion(storage, name):
                check_space(study, space)
                yield study
        finally:
            storage.remove_session()
            storage.engine.dispose()


def check_space(study: optuna.Study, space: Space) -> None:
    """Check that a study exists and has this search space.

    Raises:
        SearchError: The study has another space.
        KeyError: The study was deleted.
    """
    stored = study.user_attrs.get(_SPACE)
    if stored != (current := space.record()):
        differences = ", ".join(_differences(stored or {}, current))
        raise SearchError(
            f"study {study.study_name} has another search space ({differences}). Give the same "
            "ranges to continue it, or another name to start a new study."
        )


def _differences(stored: dict[str, Any], current: dict[str, Any]) -> Iterator[str]:
    for kind, ranges in current.items():
        before = stored.get(kind)
        if not (before and ranges):
            if before != ranges:
                yield f"{kind}: {'included' if before else 'excluded'} in the study"
            continue
        for name in ranges:
            if before.get(name) != ranges[name]:
                yield f"{kind}.{name}: {before.get(name)} in the study, {ranges[name]} now"


def _open_storage(url: str, wait_s: float) -> RDBStorage:
    import sqlalchemy
    from optuna.storages import RDBStorage

    options: dict[str, Any] = {"pool_pre_ping": True}
    if sqlalchemy.make_url(url).get_backend_name() == "sqlite":
        options["connect_args"] = {"timeout": wait_s}
    try:
        engine = sqlalchemy.create_engine(url, **options)
    except ImportError as error:
        raise SearchError(
            f"{_redact(url)} needs a driver that is not installed ({error.name}). Install it, or "
            "give a URL such as sqlite:///study.db."
        ) from error
    tables = sqlalchemy.inspect(engine).get_table_names()
    engine.dispose()
    # MLflow and Optuna both store their schema version in this table (mlflow#3374).
    if "alembic_version" in tables and "studies" not in tables:
        raise SearchError(
            f"{_redact(url)} is the database of another application, e.g. MLflow, and a study "
            "would damage it. Give the search its own database."
        )
    for retries in (2, 1, 0):
        try:
            with _migration_lock, _loggers_kept():
                return RDBStorage(url, engine_kwargs=options)
        except sqlalchemy.exc.DBAPIError as error:
            # Another process creates the same tables at the same time.
            if not retries or "locked" in str(error):
                raise
            time.sleep(0.2)
        except RuntimeError as error:
            raise SearchError(
                f"{_redact(url)} has the tables of another Optuna version: {error}"
            ) from error
    raise AssertionError("unreachable")


@contextmanager
def _translate_errors(name: str, url: str) -> Iterator[None]:
    """Translate errors of the database and its drivers into `SearchError`."""
    import optuna
    import sqlalchemy.exc

    try:
        yield
    except sqlalchemy.exc.ArgumentError as error:
        raise SearchError(
            f"the storage of study {name} is not a database URL. Give one such as "
            "sqlite:///study.db or postgresql://user@host/database."
        ) from error
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        cause = error.__cause__ or error
        what = " ".join(str(getattr(cause, "orig", None) or cause).split()).rstrip("?.")
        advice = "Check the URL, that the database runs, and that you have write permission"
        if "locked" in what:
            advice = (
                "Another process has locked the file: let it finish or stop it. SQLite supports a "
                "few processes on one machine; for more, give the search a PostgreSQL URL"
            )
        raise SearchError(
            f"study {name} in {_redact(url)} cannot be used: {what}. {advice}; then run the same "
            "command again, which resumes the search."
        ) from error


@contextmanager
def _loggers_kept() -> Iterator[None]:
    """Enable again the loggers that Optuna's migrations (`logging.config.fileConfig`) disable."""
    enabled = [
        logger
        for logger in logging.Logger.manager.loggerDict.values()
        if isinstance(logger, logging.Logger) and not logger.disabled
    ]
    try:
        yield
    finally:
        for logger in enabled:
            logger.disabled = False


@contextmanager
def _detect_deletion(storage: RDBStorage, name: str) -> Iterator[None]:
    """Raise `SearchError` for a deleted study, where Optuna raises a KeyError without a name."""
    study_id = storage.get_study_id_from_name(name)
    try:
        yield
    except KeyError as error:
        try:
            storage.get_study_name_from_id(study_id)
        except KeyError:
            raise SearchError(
                f"study {name} in {_redact(storage.url)} was deleted during the search, with all "
                "its trials. Start again with an unused name."
            ) from error
        raise


def _redact(url: str) -> str:
    """Return the URL without its password."""
    import sqlalchemy

    return sqlalchemy.make_url(url).render_as_string(hide_password=True)


@contextmanager
def _redirect_optuna_logging() -> Iterator[None]:
    """Send Optuna's warnings to the root logger instead of its own handler, and drop the rest."""
    logger = logging.getLogger("optuna")
    before = logger.level, logger.propagate, logger.handlers[:]
    logger.setLevel(logging.WARNING)
    logger.propagate, logger.handlers = True, []
    try:
        yield
    finally:
        logger.setLevel(before[0])
        logger.propagate, logger.handlers = before[1:]
