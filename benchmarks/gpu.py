"""What a GPU gains: ways to run a model, measured beside eager fp32 with the same weights.

    python benchmarks/gpu.py --out FOLDER
    python benchmarks/gpu.py --out FOLDER --device cpu --models tiny --sizes 1,4

Needs PyTorch, transformers and tokenizers, and no MLflow. Writes results.json and table.md into the
folder after each row. What cannot run is a row with its reason.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_forms import BASELINE, FORMS, PACKAGES, Build, Form, Source, package
from gpu_measure import (
    Reference,
    Seen,
    answers,
    full_flops,
    gpu_state,
    matrix_tflops,
    measure,
)
from gpu_models import models
from gpu_tables import write_tables

from mlflow_pt_deploy.data import load_data
from mlflow_pt_deploy.errors import root_cause
from mlflow_pt_deploy.system.hardware import hardware

_LONGEST_BUILD_S = 120


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
        folder: For variants; it is removed afterwards.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.deadline = time.perf_counter() + options.minutes * 60
        self.splits = load_data(options.data)
        self.rows = [str(row) for row in self.splits.test.rows]
        self.out = Path(options.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.sizes = [int(size) for size in options.sizes.split(",")]
        self.forms = [form for form in FORMS if not options.forms or form in options.forms]
        self.facts: dict[str, Any] = {}
        self.seen: list[Seen] = []

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
        sources = list(self._sources())
        references = [self._reference(name, source) for name, source in sources]
        built = False
        for form in self.forms:
            if form in PACKAGES and not built:
                built = True
                self._build_packages([source for _, source in sources])
            for (name, source), reference in zip(sources, references, strict=True):
                self._form(name, form, source, reference)
        self.facts["gpu at the end"] = gpu_state(device)
        self._write()
        print((self.out / "table.md").read_text(encoding="utf8"))

    def _sources(self) -> Iterator[tuple[str, Source]]:
        options = self.options
        names = options.models.split(",")
        tokens = []
        for model in models(names, self.splits, options.device, options.minilm):
            folder = self.folder / model.name
            folder.mkdir()
            classifier = model.classifier
            tokens = [len(row) for row in classifier.preprocessor.encode(self.rows)]
            self.facts[f"weights of {model.name}"] = model.weights
            yield model.name, Source(classifier, self.rows, folder, options.device)
        self.facts["tokens of a text"] = f"mean {sum(tokens) / len(tokens):.1f}, most {max(tokens)}"
        start = time.perf_counter()
        classifier.preprocessor.encode(self.rows)
        tokenizing = (time.perf_counter() - start) / len(self.rows)
        self.facts["tokenization, microseconds a text, one thread"] = tokenizing * 1e6

    def _build_packages(self, sources: Sequence[Source]) -> None:
        """Compile all AOTInductor packages at once, while nothing is timed."""
        if time.perf_counter() > self.deadline:
            return
        start = time.perf_counter()
        builds = [(source, Build(source, package(source))) for source in sources]
        for source, build in builds:
            reason = build.wait(start + _LONGEST_BUILD_S - time.perf_counter())
            if reason:
                source.failed[build.target.name] = reason[:300]
                (self.out / f"{source.folder.name}-{build.target.name}.txt").write_text(reason)
        self.facts["AOTInductor builds, seconds"] = time.perf_counter() - start

    def _reference(self, name: str, source: Source) -> Reference:
        preprocessor = source.classifier.preprocessor
        form = FORMS[BASELINE](source)
        return Reference(
            form=form,
            preprocessor=preprocessor,
            rows=self.rows,
            logits=answers(form, preprocessor, self.rows),
            targets=self.splits.test.targets,
            flops=full_flops(source.classifier.network.config)
            if self.options.device != "cpu"
            else 0,
        )

    def _form(self, name: str, form: str, source: Source, reference: Reference) -> None:
        seen = Seen(name, form)
        self.seen.append(seen)
        if time.perf_counter() > self.deadline:
            seen.reason = f"not run: the {self.options.minutes:g} minutes were over"
            return
        start = time.perf_counter()
        before_mb = self._settle()
        try:
            built: Form = FORMS[form](source)
            measure(built, reference, seen, self.sizes, self.options.device)
        except Exception as error:  # a failure is a row of the table
            seen.reason = f"{type(error).__name__}: {root_cause(error)}"[:300]
        seen.build_s = time.perf_counter() - start
        if self.options.device != "cpu":
            seen.peak_mb = torch.cuda.max_memory_allocated() / 1e6 - before_mb
        self._write()
        print(f"{seen.build_s:6.1f} s  {name}  {form}  {seen.reason}", flush=True)

    def _settle(self) -> float:
        """Free what the previous form left; megabytes on the device that are still in use."""
        gc.collect()
        if self.options.device == "cpu":
            return 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6

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
        "--forms", action="append", choices=list(FORMS), help="a form to run; repeat for more"
    )
    parser.add_argument("--minutes", type=float, default=5, help="no form starts after that")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
