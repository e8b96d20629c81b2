"""Contributions to a logit of a static student: they sum to it, and are worked out by hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mlflow_pt_deploy.artifacts import LoadedVariant, load_variant
from mlflow_pt_deploy.artifacts.cascade_writer import write_cascade
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.explanation.explainer import Explainer
from mlflow_pt_deploy.explanation.static import METHOD, attribute_static
from mlflow_pt_deploy.explanation.words import Word
from mlflow_pt_deploy.runtimes.base import Logits
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.runtimes.numpy_static import NumPy, StaticPredictor

SAVED = Path(__file__).parents[1] / "fixtures" / "saved-by-0.1.0" / "variant"
ODD = ("", " ", "?", "my card my card my card", "REFUND: ça où? 😀 card", "a" * 40, "card " * 400)


@pytest.fixture(scope="module", params=["tiny", "saved"])
def student(request: pytest.FixtureRequest, exported: Callable[..., Path]) -> LoadedVariant:
    return load_variant(exported(NumPy(), "static") if request.param == "tiny" else SAVED)


def never(rows: object) -> Logits:
    raise AssertionError("a static student is explained without scoring other rows")


def test_contributions_and_base_are_the_logit(student: LoadedVariant, tiny_splits: Splits) -> None:
    explainer = Explainer(student)
    for text in (*tiny_splits.test.rows, *ODD):
        logits = student.logits([text])[0]
        logits -= logits.mean()
        for label, logit in zip(student.labels, logits, strict=True):
            found = explainer.explain(text, label, never)
            values = [each["value"] for each in found["contributions"]]
            assert found["method"] == METHOD
            assert found["logit"] == pytest.approx(logit, abs=1e-5)
            assert found["base"] + sum(values) == pytest.approx(logit, abs=1e-4)
            assert abs(found["delta"]) < 1e-4


def test_the_word_that_tells_the_label_has_the_largest_share(
    student: LoadedVariant, tiny_splits: Splits
) -> None:
    text = "please help me with my card today"
    found = Explainer(student).explain(text, "card", never)
    best = max(found["contributions"], key=lambda each: each["value"])
    assert text[best["start"] : best["end"]] == "card"
    assert not found["truncated"]


def test_a_truncated_text_says_so(student: LoadedVariant) -> None:
    found = Explainer(student).explain("my card " * 100, "card", never)
    assert found["truncated"]
    assert found["contributions"][-1]["end"] < 600


def by_hand(epsilon: float = 0.0, **arrays: list[object]) -> StaticPredictor:
    """Two pieces, no n-grams: embeddings (1, -1) and (3, -3), one hidden unit, two labels."""
    given = {
        "embeddings": [[1, -1], [3, -3]],
        "hidden": [[1], [0]],
        "hidden_bias": [0.5],
        "output": [[5, 1]],  # 2 and -2 from their mean
        "output_bias": [0.5, 0],
        **arrays,
    }
    tables = {name: np.array(table, dtype=np.float32) for name, table in given.items()}
    return StaticPredictor(tables, pieces=2, buckets=1, multipliers=[1], epsilon=epsilon)


def test_shares_worked_out_by_hand() -> None:
    # sum (4, -4), norm (1, -1), hidden without its mean (.5, -.5): 1 + .5, logit 2 * 1.5 + .25
    words = [Word(0, 1, (0,)), Word(2, 3, (1,))]
    found = attribute_static(by_hand(), [0, 1], words, 0)
    assert found.logit == pytest.approx(3.25)
    assert found.base == pytest.approx(2 * 0.5 + 0.25)
    assert found.values == pytest.approx([2 * 1 / 4, 2 * 3 / 4])


def test_a_unit_that_is_off_has_no_share() -> None:
    found = attribute_static(by_hand(hidden_bias=[-9]), [0, 1], [Word(0, 1, (0,))], 0)
    assert (found.logit, found.base, *found.values) == (0.25, 0.25, 0)


def test_an_ngram_is_split_over_its_pieces_in_words() -> None:
    table = [[0, 0], [0, 0], [1, -1]]
    tables = {
        "embeddings": np.array(table, dtype=np.float32),
        "hidden": np.array([[1], [0]], dtype=np.float32),
        "hidden_bias": np.zeros(1, dtype=np.float32),
        "output": np.array([[2, 0]], dtype=np.float32),
        "output_bias": np.zeros(2, dtype=np.float32),
    }
    model = StaticPredictor(tables, pieces=2, buckets=1, multipliers=[1, 1], epsilon=0.0)
    # 0 is special: of three bigrams two touch a word, and the one of 1 and 1 touches it twice
    words = [Word(0, 1, (1,)), Word(2, 3, (2,))]
    found = attribute_static(model, [0, 1, 1, 0, 0], words, 0)
    assert found.logit == pytest.approx(1)
    assert found.values == pytest.approx([1.5 / 4, 1.5 / 4])
    assert found.base == pytest.approx(1 / 4)  # the bigram of 0 and 0


@pytest.mark.parametrize(("threshold", "method"), [(0.0, METHOD), (1.0, "occlusion")])
def test_a_cascade_explains_the_stage_that_answers(
    exported: Callable[..., Path], tmp_path: Path, threshold: float, method: str
) -> None:
    stages = exported(NumPy(), "static"), exported(Eager())
    write_cascade(tmp_path / "c", *stages, threshold=threshold, golden_rows=["my card"])
    loaded = load_variant(tmp_path / "c", threads=1)

    def score(rows: Sequence[Sequence[int]]) -> Logits:
        return loaded.predict(loaded.preprocessor.collate(rows))

    found = Explainer(loaded).explain("my card", "card", score)
    assert found["method"] == method
    logits = loaded.logits(["my card"])[0]
    assert found["logit"] == pytest.approx(logits[0] - logits.mean(), abs=1e-4)


def test_no_pytorch_is_needed() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from pathlib import Path\n"
        "from mlflow_pt_deploy.artifacts import load_variant\n"
        "from mlflow_pt_deploy.explanation.explainer import Explainer\n"
        f"loaded = load_variant(Path({str(SAVED)!r}))\n"
        "print(Explainer(loaded).explain('my card', 'card', None)['method'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == f"{METHOD}\n", done.stderr
