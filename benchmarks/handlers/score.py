"""Scores texts with the plain teacher, or with our artifact in its own runtime."""

from collections.abc import Callable


def make_score(teacher: str | None, artifact: str | None) -> Callable[[list[str]], list[dict]]:
    """Create a scoring function; `artifact` is a folder that MLflow can load."""
    return _ours(artifact) if artifact else _eager(str(teacher))


def _eager(folder: str) -> Callable[[list[str]], list[dict]]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def score(texts: list[str]) -> list[dict]:
        inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            best = model(**inputs).logits.softmax(-1).max(-1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"label": model.config.id2label[at], "score": value} for at, value in pairs]

    return score


def _ours(folder: str) -> Callable[[list[str]], list[dict]]:
    import mlflow

    pyfunc = mlflow.pyfunc.load_model(folder)._model_impl
    preprocessor, predict = pyfunc.loaded.preprocessor, pyfunc.loaded.predict

    def score(texts: list[str]) -> list[dict]:
        logits = predict(preprocessor.collate(preprocessor.encode(list(texts))))
        return pyfunc.service.formatter.to_objects(logits)

    return score
