"""Exact contributions of words to a logit of a static student.

The network is a sum of embeddings, a layer norm, a hidden ReLU layer and an output layer. With the
denominator of the norm and the set of active hidden units held at their values for this text, the
logit is linear in the embeddings. So gradient x input splits it without a remainder:

    logit = base + sum over embeddings e of e . g,    g = H (a * w) / s

`H` is the hidden layer (with the norm's mean taken out), `a` the active units, `w` the output
weights of the label above their mean over all labels, `s` the denominator. That gradient x input is
exact for piecewise linear networks is due to Ancona et al. 2018; holding the norm's denominator is
the rule of Ali et al. 2022 for layer norms. It is exact for this text, not a forecast of what
another text would get.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlflow_pt_deploy.explanation.result import Attribution, above_mean
from mlflow_pt_deploy.explanation.words import Word
from mlflow_pt_deploy.runtimes.numpy_static import StaticPredictor

METHOD = "gradient_x_input"


def attribute_static(
    model: StaticPredictor, ids: Sequence[int], words: Sequence[Word], label: int
) -> Attribution:
    """Split a logit over the words.

    The share of an n-gram is split evenly over its tokens that belong to words. What belongs to
    special tokens alone, and the biases, are the base.

    Args:
        model: The model.
        ids: Token ids of the text.
        words: Its words.
        label: Index of the explained label.
    """
    array = np.asarray([ids], dtype=np.int64)
    inputs = {"input_ids": array, "attention_mask": np.ones_like(array)}
    logit = float(above_mean(model(inputs)[0].astype(np.float64), label))
    rows = model.ngram_rows(array[0])
    gradient, base = _linear(model, np.concatenate(rows), label)
    in_words = np.zeros(len(ids))
    in_words[[at for word in words for at in word.pieces]] = 1
    pieces = np.zeros(len(ids))
    for size, indices in enumerate(rows, start=1):
        shares = model.embeddings[indices] @ gradient
        windows = np.lib.stride_tricks.sliding_window_view(in_words, size)
        members = windows.sum(1)
        base += float(shares[members == 0].sum())
        each = shares / np.maximum(members, 1)
        for place in range(size):
            pieces[place : place + len(each)] += each * windows[:, place]
    values = np.array([pieces[list(word.pieces)].sum() for word in words])
    return Attribution(METHOD, logit, base, words, values)


def _linear(
    model: StaticPredictor, rows: np.ndarray[tuple[int], np.dtype[np.int64]], label: int
) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], float]:
    """Gradient of the logit by an embedding, float64 (width,), and the part of the biases."""
    total = model.embeddings[rows].sum(0, dtype=np.float64)
    hidden = model.hidden.astype(np.float64)
    scale = np.sqrt(total.var() + model.epsilon)
    active = total @ hidden / scale + model.hidden_bias > 0
    weights = above_mean(model.output.astype(np.float64), label) * active
    base = float(weights @ model.hidden_bias + above_mean(model.output_bias, label))
    return hidden @ weights / scale, base
