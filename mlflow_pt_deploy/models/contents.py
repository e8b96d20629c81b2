"""Inspect model folders: formats of other libraries, missing and damaged files."""

from __future__ import annotations

from pathlib import Path

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_LFS = b"version https://git-lfs.github.com"
_OTHER_LIBRARIES = {
    "adapter_config.json": "is a PEFT adapter without its base model. Merge both first with peft's "
    "merge_and_unload, and give the result.",
    "model_index.json": "is a diffusers pipeline, which generates images. Give a text or image "
    "classifier.",
}
_FORMATS = {
    "*.gguf": "GGUF (llama.cpp)",
    "*.onnx": "ONNX",
    "onnx/*.onnx": "ONNX",
    "openvino_model.xml": "OpenVINO",
    "*.h5": "TensorFlow",
    "saved_model.pb": "TensorFlow",
    "*.keras": "Keras",
    "flax_model.msgpack": "Flax",
    "*.pkl": "pickle",
    "*.joblib": "pickle",
    "*.pt": "PyTorch's pickle or TorchScript",
    "*.pth": "PyTorch's pickle or TorchScript",
    "*.ckpt": "PyTorch Lightning",
}


def foreign_format(folder: Path) -> str:
    """Why a folder is not a transformers model, and what to do; empty if it is one."""
    for name, problem in _OTHER_LIBRARIES.items():
        if (folder / name).is_file():
            return problem
    if (folder / "config.json").is_file():
        return ""
    if (folder / "MLmodel").is_file():
        return (
            "is an MLflow model folder. Give its URI, e.g. models:/NAME/VERSION or "
            "runs:/RUN_ID/NAME, or the subfolder with config.json."
        )
    if inside := sorted(path.parent.name for path in folder.glob("*/config.json")):
        return (
            f"has no config.json, but its subfolder {inside[-1]} has one. Give that folder: "
            f"{folder / inside[-1]}"
        )
    found = _formats(folder)
    return found and (
        f"contains {found} and no transformers model (config.json). Give the original PyTorch "
        "model as written by transformers' save_pretrained."
    )


def weights_problem(folder: Path) -> str:
    """Problem of the weight files and the remedy; empty if they look usable."""
    files = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    for path in [*files[:1], *folder.glob("model-*.safetensors"), *folder.glob("tokenizer.json")]:
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                return f"{path.name} is a Git LFS pointer, not the file itself; run git lfs pull"
    if files:
        return ""
    found = _formats(folder)
    return "it has neither model.safetensors nor pytorch_model.bin" + (
        f", only {found}" if found else ""
    )


def tokenizer_problem(folder: Path) -> str:
    """Problem of the tokenizer files and the remedy; empty if they look usable."""
    if (folder / "tokenizer.json").is_file():
        return ""
    names = {path.name for path in folder.iterdir()}
    sources = sorted(name for name in names if name.endswith((".model", ".spm", ".tiktoken")))
    if sources:
        return (
            f"its tokenizer is {sources[0]} without a tokenizer.json. Convert it once: pip install "
            "sentencepiece tiktoken protobuf, then transformers.AutoTokenizer.from_pretrained("
            "FOLDER).save_pretrained(FOLDER)"
        )
    if not names & {"vocab.txt", "vocab.json", "tokenizer_config.json"}:
        return "it has no tokenizer; save it in the folder with tokenizer.save_pretrained"
    return ""


def _formats(folder: Path) -> str:
    found = [name for pattern, name in _FORMATS.items() if any(folder.glob(pattern))]
    return " and ".join(dict.fromkeys(found))
