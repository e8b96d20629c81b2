"""A model in `mlflow.pyfunc.spark_udf`, on a real local Spark."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.runtimes.numpy_static import NumPy

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROWS = 40_000
LABELS = ("card", "refund", "transfer")


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    sql = pytest.importorskip("pyspark.sql", reason="pyspark is not installed")
    if not shutil.which("java"):
        pytest.skip("Spark needs a Java runtime")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of Spark's Python workers
        builder = sql.SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
        for name in ("spark.driver.host", "spark.driver.bindAddress"):
            builder = builder.config(name, "127.0.0.1")
        session = builder.getOrCreate()
        session.sparkContext.setLogLevel("OFF")
        yield session
        session.stop()


@pytest.fixture(scope="module")
def table(spark: Any) -> Any:
    """A word of each text tells its label; every thousandth text is null."""
    rows = [
        (number, None if number % 1000 == 7 else f"please {LABELS[number % 3]} {number}")
        for number in range(ROWS)
    ]
    return spark.createDataFrame(rows, "id int, text string").repartition(4)


@pytest.fixture(scope="module")
def model(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("spark") / "model"
    flavor.save_model(exported(NumPy(), "static"), folder)
    return str(folder)


def test_rows_become_a_label_and_a_score_and_nulls_stay(spark: Any, table: Any, model: str) -> None:
    from pyspark.sql.functions import coalesce, col, lit, when

    score = mlflow.pyfunc.spark_udf(spark, model)
    answer = score(coalesce(col("text"), lit("")))
    scored = table.withColumn("answer", when(col("text").isNotNull(), answer))
    assert scored.schema["answer"].dataType.simpleString() == "struct<label:string,score:double>"
    found = scored.selectExpr("id", "text", "answer.label", "answer.score").collect()
    assert len(found) == ROWS
    for row in found:
        if row.text is None:
            assert row.label is row.score is None
        else:
            assert row.label == LABELS[row.id % 3]
            assert 1 / 3 < row.score <= 1


def test_top_k_is_an_array(spark: Any, table: Any, model: str) -> None:
    from pyspark.sql.functions import col

    kind = "array<struct<label:string,score:double>>"
    best = mlflow.pyfunc.spark_udf(spark, model, result_type=kind, params={"top_k": 2})
    few = table.where("text is not null").limit(3)
    for row in few.withColumn("best", best(col("text"))).collect():
        first, second = row.best
        assert first.label == LABELS[row.id % 3]
        assert first.score > second.score


def test_an_unguarded_null_is_refused_by_name(spark: Any, table: Any, model: str) -> None:
    from pyspark.errors import PythonException
    from pyspark.sql.functions import col

    score = mlflow.pyfunc.spark_udf(spark, model)
    with pytest.raises(PythonException, match="'text' row .* is null; every row must be a text"):
        table.where("text is null").withColumn("answer", score(col("text"))).collect()
