"""Explains the label of a text with the method that its model allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlflow_pt_deploy.artifacts import LoadedVariant
from mlflow_pt_deploy.errors import UnsupportedError, VariantError
from mlflow_pt_deploy.explanation import integrated_gradients
from mlflow_pt_deploy.explanation.integrated_gradients import IntegratedGradients
from mlflow_pt_deploy.explanation.occlusion import Score, attribute_by_occlusion
from mlflow_pt_deploy.explanation.result import Attribution
from mlflow_pt_deploy.explanation.static import attribute_static
from mlflow_pt_deploy.explanation.words import Word, words_of
from mlflow_pt_deploy.preprocessing.text import TextPreprocessor
from mlflow_pt_deploy.runtimes.cascade import CascadePredictor
from mlflow_pt_deploy.runtimes.numpy_static import StaticPredictor


class Explainer:
    """Explains labels of one loaded variant.

    Args:
        loaded: The variant.
        method: ``auto``: exact for a static student in NumPy, also as the fast stage of a cascade
            if that answers; occlusion for every other. ``integrated_gradients``: see there.

    Raises:
        VariantError: The method is not possible with this variant.
    """

    def __init__(self, loaded: LoadedVariant, method: str = "auto") -> None:
        self._loaded = loaded
        self._gradients = (
            IntegratedGradients(loaded) if method == integrated_gradients.METHOD else None
        )

    def explain(
        self, text: str, label: str, score: Score, check: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Explain a label of a text.

        Args:
            text: The text.
            label: The label.
            score: Computes rows of token ids with this variant.
            check: Called between the passes of integrated gradients; raises to stop.

        Returns:
            See `Attribution.to_json`.

        Raises:
            UnsupportedError: The variant reads images.
            VariantError: A value is not finite.
        """
        preprocessor = self._loaded.preprocessor
        if not isinstance(preprocessor, TextPreprocessor):
            raise UnsupportedError("explanations are for texts; this model reads images.")
        located = preprocessor.locate(text)
        words = words_of(text, located)
        index = self._loaded.labels.index(label)
        if self._gradients is not None:
            pad_id = preprocessor.pad_id
            found = self._gradients.attribute(located.ids, pad_id, words, index, check)
        else:
            found = self._attribute(preprocessor, located.ids, words, index, score)
        if not np.isfinite([found.logit, found.base, *found.values]).all():
            raise VariantError("a logit of the explanation is not finite.")
        return found.to_json(label, truncated=located.truncated)

    def _attribute(
        self,
        preprocessor: TextPreprocessor,
        ids: list[int],
        words: list[Word],
        label: int,
        score: Score,
    ) -> Attribution:
        model = self._loaded.predict
        if isinstance(model, CascadePredictor):
            fast, _ = model.models
            _, unsure = model.run_fast_stage(preprocessor.collate([ids]))
            model = model if unsure[0] else fast
        if isinstance(model, StaticPredictor):
            return attribute_static(model, ids, words, label)
        return attribute_by_occlusion(score, ids, preprocessor.encode([""])[0], words, label)
