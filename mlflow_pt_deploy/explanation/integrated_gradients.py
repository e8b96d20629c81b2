"""Contributions of words to a logit of an eager network, by integrated gradients.

The gradients of the logit are summed along the straight line from a text whose words are padding to
the text itself (Sundararajan et al. 2017), by Captum. The values sum to the difference of the two
logits; the error of the sum is stated as the delta.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlflow_pt_deploy.artifacts import LoadedVariant
from mlflow_pt_deploy.errors import MissingExtraError, UnsupportedError
from mlflow_pt_deploy.explanation.result import Attribution, above_mean
from mlflow_pt_deploy.explanation.words import Word
from mlflow_pt_deploy.runtimes.device_memory import unguarded
from mlflow_pt_deploy.runtimes.eager import EagerPredictor

METHOD = "integrated_gradients"

STEPS = 50
"""Points on the line."""

_BATCH_TOKENS = 1024


class IntegratedGradients:
    """Integrated gradients of one loaded variant.

    Args:
        loaded: An eager variant in fp32 of a text classifier.

    Raises:
        UnsupportedError: The variant has no gradients, or its network takes no embeddings.
        MissingExtraError: Captum is not installed.
    """

    def __init__(self, loaded: LoadedVariant) -> None:
        predict, name = unguarded(loaded.predict), loaded.manifest.name
        if not isinstance(predict, EagerPredictor) or loaded.running.precision != "fp32":
            raise UnsupportedError(
                f"{name} has no gradients: {METHOD} needs an eager variant in fp32. Serve such a "
                "one, or set explain_method=auto."
            )
        try:
            import captum.attr
        except ModuleNotFoundError as error:
            raise MissingExtraError("captum", "explain") from error
        self._method = captum.attr.IntegratedGradients
        self._network = predict.module.network
        takes = inspect.signature(self._network.forward).parameters
        if self._network.config.is_encoder_decoder or "inputs_embeds" not in takes:
            raise UnsupportedError(
                f"{name}: {METHOD} needs a network that takes embeddings, and "
                f"{type(self._network).__name__} does not. Set explain_method=auto."
            )

    def attribute(
        self,
        ids: Sequence[int],
        pad_id: int,
        words: Sequence[Word],
        label: int,
        check: Callable[[], None],
    ) -> Attribution:
        """Split a logit over the words.

        Args:
            ids: Token ids of the text.
            pad_id: Token id that stands for the tokens of words at the start of the line.
            words: Its words.
            label: Index of the explained label.
            check: Called before each pass; raises to stop.
        """
        import torch

        def forward(embeddings: torch.Tensor) -> Any:
            check()
            mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
            output = self._network(inputs_embeds=embeddings, attention_mask=mask)
            return above_mean(output.logits, label)

        table = self._network.get_input_embeddings()
        start_ids = list(ids)
        for word in words:
            for at in word.pieces:
                start_ids[at] = pad_id
        with torch.no_grad():
            pair = table(torch.tensor([ids, start_ids], device=table.weight.device))
            logit, base = forward(pair).tolist()
        text, start = pair.split(1)
        found = self._method(forward).attribute(
            text,
            start,
            n_steps=STEPS,
            internal_batch_size=max(1, _BATCH_TOKENS // len(ids)),
        )
        pieces = found[0].sum(-1).double().cpu().numpy()
        values = np.array([pieces[list(word.pieces)].sum() for word in words])
        return Attribution(METHOD, logit, base, words, values)
