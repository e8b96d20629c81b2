"""A tiny ONNX Runtime variant, in which words vote for a colour."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mlflow_pt_deploy.artifacts import write_variant
from mlflow_pt_deploy.artifacts.manifest import MANIFEST
from mlflow_pt_deploy.evaluation import Worker
from mlflow_pt_deploy.preprocessing import TextPreprocessor
from mlflow_pt_deploy.runtimes.onnxruntime import FILE, OnnxRuntime

LABELS = ("blue", "green", "red")
VOCABULARY = {"[PAD]": 0, "sea": 1, "leaf": 2, "blood": 3, "thing": 4}
ROWS = ("sea sea leaf", "leaf", "blood thing thing blood sea", "thing sea")
PREDICTIONS = [0, 1, 2, 0]  # the colour with most votes; "thing" has no vote


@dataclass(frozen=True)
class Votes(OnnxRuntime):
    """Logits are the votes of the words of a row."""

    def export(self, module, example, calibration, folder):
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        weights = [
            numpy_helper.from_array(module.votes, "votes"),
            numpy_helper.from_array(np.array([-1]), "last"),
            numpy_helper.from_array(np.array([1]), "length"),
        ]
        nodes = [
            helper.make_node("Gather", ["votes", "input_ids"], ["each"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
            helper.make_node("Mul", ["each", "wide"], ["real"]),
            helper.make_node("ReduceSum", ["real", "length"], ["logits"], keepdims=0),
        ]
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
            for name in ("input_ids", "attention_mask")
        ]
        output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
        graph = helper.make_graph(nodes, "votes", inputs, [output], weights)
        opset = helper.make_opsetid("", 18)
        onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), folder / FILE)


class Ballot(SimpleNamespace):
    """The model of `Votes`."""

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (torch.from_numpy(self.votes)[ids] * mask[..., None]).sum(1)


def built_for_gpu(folder: Path) -> Path:
    """Mark a variant as built for a GPU; its graph runs on every device."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["options"]["device"] = "cuda"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def export(folder: Path, *, always_green: bool = False) -> Path:
    votes = np.zeros((5, 3), dtype=np.float32)
    votes[[1, 2, 3], [0, 1, 2]] = 1
    if always_green:
        votes[:, 1] = 10
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="thing"))
    tokenizer.pre_tokenizer = Whitespace()
    preprocessor = TextPreprocessor(tokenizer, max_length=16, pad_id=0)
    module = Ballot(preprocessor=preprocessor, labels=LABELS, votes=votes)
    write_variant(
        Votes(),
        module,
        folder,
        model=folder.name.partition("-")[0],
        example={},
        golden_rows=["sea leaf"],
    )
    return folder


def start_worker(folder: Path, timeout_s: float = 60.0) -> Worker:
    worker = Worker(folder, ROWS[0], threads=1, timeout_s=timeout_s)
    worker.load_rows(ROWS)
    return worker
