"""What a GPU gains: the variants that it gets, measured beside eager fp32 with the same weights.

    python benchmarks/gpu.py --out FOLDER
    python benchmarks/gpu.py --out FOLDER --device cpu --models tiny --sizes 1,4

Needs PyTorch, transformers and tokenizers, and no MLflow. Variants are built and loaded as by
``pt-deploy optimize``. Writes results.json and table.md into the folder after each row. What cannot
run is a row with its reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_measure import Reference, Seen, full_flops, gpu_state, matrix_tflops, measure, used_mb
from gpu_models import models
from gpu_tables import write_tables

from mlflow_pt_deploy.artifacts import load_variant
from mlflow_pt_deploy.artifacts.builder import BuildResult, build
from mlflow_pt_deploy.data import load_data
from mlflow_pt_deploy.errors import root_cause
from mlflow_pt_deploy.models import save_classifier
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.catalog import GPU_VARIANTS, ON_REQUEST
from mlflow_pt_deploy.system.device import CUDA
from mlflow_pt_deploy.system.hardware import hardware

BASELINE = "eager-fp32"


def variants_for(device: str) -> list[Variant]:
    """The variants of the catalog for a GPU; with ``cpu`` the same runtimes on the CPU.

    What is built in seconds comes first: where time runs out, the last ones are not run.
    """
    found = [v for v in (*GPU_VARIANTS, *ON_REQUEST) if v.device == CUDA]
    return sorted((replace(v, device=device) for v in found), key=lambda v: v.compiles)


def short_name(variant: Variant) -> str:
    """Runtime and precision."""
    return f"{variant.runtime}-{variant.precision}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    options = _parser().parse_args(arguments)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        Run(options, Path(folder)).go()


class Run:
    """One run of the benchmark.

    Args:
        options: See `_parser`.
        folder: For models and variants; it is removed afterwards.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.deadline: float = time.perf_counter() + options.minutes * 60
        self.splits = load_data(options.data)
        self.rows = [str(row) for row in self.splits.test.rows]
        self.out = Path(options.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.sizes = [int(size) for size in options.sizes.split(",")]
        self.facts: dict[str, Any] = {}
        self.seen: list[Seen] = []
        self.references: dict[str, Reference] = {}

    def go(self) -> None:
        device = self.options.device
        self.facts = {
            "date": time.strftime("%Y-%m-%d"),
            "hardware": {**hardware(), "host": platform.platform()},
            "data": f"{self.splits.source}, {len(self.rows)} test texts",
            "gpu before": gpu_state(device),
            "matrix product, TFLOP/s": matrix_tflops(device),
            "gpu after the matrix products": gpu_state(device),
        }
        folders = self._models()
        wanted = [v for v in variants_for(device) if self._is_wanted(v)]
        for compiles in (False, True):
            self._variants(folders, [v for v in wanted if v.compiles == compiles])
        self.facts["gpu at the end"] = gpu_state(device)
        self._write()
        print((self.out / "table.md").read_text(encoding="utf8"))

    def _is_wanted(self, variant: Variant) -> bool:
        name = short_name(variant)
        chosen: list[str] | None = self.options.variants
        return not chosen or name in (*chosen, BASELINE)

    def _models(self) -> dict[str, Path]:
        """Write the models as Hugging Face folders."""
        options, folders = self.options, {}
        for model in models(options.models.split(","), self.splits, options.device, options.minilm):
            folders[model.name] = self.folder / model.name
            save_classifier(model.classifier, folders[model.name])
            preprocessor = model.classifier.preprocessor
            start = time.perf_counter()
            tokens = [len(row) for row in preprocessor.encode(self.rows)]
            took_s = time.perf_counter() - start
            self.facts[f"weights of {model.name}"] = model.weights
            self.facts[f"tokens of a text, {model.name}"] = {
                "mean": sum(tokens) / len(tokens),
                "most": max(tokens),
                "microseconds to tokenize": took_s / len(tokens) * 1e6,
            }
        return folders

    def _variants(self, folders: dict[str, Path], variants: Sequence[Variant]) -> None:
        """Build variants of all models while nothing is timed, then measure them."""
        if not variants or self._is_over():
            for name in folders:
                self.seen += [self._not_run(Seen(name, short_name(v))) for v in variants]
            return
        built = build(
            folders,
            self.splits,
            self.folder / "variants",
            variants=variants,
            parallel=self.options.parallel,
        )
        first = sorted(built, key=lambda result: f"{result.runtime}-{result.precision}" != BASELINE)
        for result in first:
            self._row(result)

    def _row(self, result: BuildResult) -> None:
        seen = Seen(result.model, f"{result.runtime}-{result.precision}", result.reason)
        seen.build_s = result.seconds
        self.seen.append(seen)
        if result.folder is not None and self._is_over():
            self._not_run(seen)
        elif result.folder is not None:
            start = time.perf_counter()
            try:
                self._measure(result.folder, seen)
            except Exception as error:  # a failure is a row of the table
                seen.reason = f"{type(error).__name__}: {root_cause(error)}"[:300]
            seen.measured_s = time.perf_counter() - start
        self._write()
        print(f"{seen.measured_s:6.1f} s  {result.name}  {seen.reason}", flush=True)

    def _measure(self, folder: Path, seen: Seen) -> None:
        device = self.options.device
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
        before_mb = used_mb(device)
        loaded = load_variant(folder, device=device, allow_code=True)
        if seen.model not in self.references:  # the baseline is the first one
            flops = full_flops(self.folder / seen.model) if device != "cpu" else 0.0
            self.references[seen.model] = Reference.of(
                loaded, self.rows, self.splits.test.targets, flops
            )
        measure(loaded, self.references[seen.model], seen, self.sizes, device)
        seen.used_mb = used_mb(device) - before_mb

    def _is_over(self) -> bool:
        return time.perf_counter() > self.deadline

    def _not_run(self, seen: Seen) -> Seen:
        seen.reason = f"not run: the {self.options.minutes:g} minutes were over"
        return seen

    def _write(self) -> None:
        content = {"facts": self.facts, "rows": [seen.record() for seen in self.seen]}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (self.out / "results.json").write_text(text, encoding="utf8")
        write_tables(self.facts, self.seen, self.out / "table.md")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for results.json and table.md")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a trial of the program")
    parser.add_argument(
        "--data", default="catalog", help="as for pt-deploy: a folder, catalog, ..."
    )
    parser.add_argument("--models", default="minilm-l6,bert-base", help="also: tiny")
    parser.add_argument("--minilm", default="", help="folder of MiniLM-L6, if not its package")
    parser.add_argument("--sizes", default="1,8,64,256,1024", help="batch sizes in rows")
    parser.add_argument(
        "--variants",
        action="append",
        choices=[short_name(variant) for variant in variants_for(CUDA)],
        help="a variant to measure; repeat for more",
    )
    parser.add_argument("--parallel", type=int, default=4, help="variants built at the same time")
    parser.add_argument("--minutes", type=float, default=3.5, help="no variant starts after that")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # several packages are compiled at once, and each would start a process per core
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    main()
