"""What lies in a model folder: formats of other libraries, and files that are not what they say."""

from __future__ import annotations

from pathlib import Path

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_LFS = b"version https://git-lfs.github.com"
_MARKS = {
    "adapter_config.json": "is a PEFT adapter without its base model. Merge the two first, with "
    "peft's merge_and_unload, and give the result.",
    "model_index.json": "is a diffusers pipeline, which makes images. Give a classifier of texts "
    "or images.",
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


def other_format(folder: Path) -> str:
    """What a folder is instead of a transformers model, and what to do; empty if it is one."""
    for name, problem in _MARKS.items():
        if (folder / name).is_file():
            return problem
    if (folder / "config.json").is_file():
        return ""
    if (folder / "MLmodel").is_file():
        return (
            "is MLflow's model folder. Give its address, e.g. models:/NAME/VERSION or "
            "runs:/RUN_ID/NAME, or the folder inside that has a config.json."
        )
    if inside := sorted(path.parent.name for path in folder.glob("*/config.json")):
        return (
            f"has no config.json, but its folder {inside[-1]} has. Give that one: "
            f"{folder / inside[-1]}"
        )
    found = _formats(folder)
    return found and (
        f"holds {found} and no transformers model (config.json). Give the PyTorch model that it "
        "was made from, as transformers' save_pretrained writes it."
    )


def check_weights(folder: Path) -> str:
    """What is wrong with the weights' files, and what to do; empty if they can be tried."""
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


def check_tokenizer(folder: Path) -> str:
    """What is wrong with the tokenizer's files, and what to do; empty if they can be tried."""
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
        return "it has no tokenizer; save it there too, with tokenizer.save_pretrained"
    return ""


def _formats(folder: Path) -> str:
    found = [name for pattern, name in _FORMATS.items() if any(folder.glob(pattern))]
    return " and ".join(dict.fromkeys(found))
