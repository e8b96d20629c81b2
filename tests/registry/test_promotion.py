"""Promotion moves the aliases of a registered model and stores its digest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from tiny.artifact import SAVED, edit_mlmodel, in_pyfunc

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.artifacts import read_manifest
from mlflow_pt_deploy.errors import ArtifactError, TrackingError, UntrustedError
from mlflow_pt_deploy.registry.addresses import DIGEST_TAG, ModelSpec, resolve
from mlflow_pt_deploy.registry.aliases import placement
from mlflow_pt_deploy.registry.promotion import Candidate, Promotion, champion
from mlflow_pt_deploy.registry.promotion import promote as promote_candidate
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.runtimes.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.serving.model.loaded_model import load_version


def promote(uri: str, name: str, why: str) -> Promotion:
    return promote_candidate(Candidate(uri, why), name, why)


def _logged(folder: Path) -> str:
    with mlflow.start_run():
        return f"models:/{flavor.log_model(folder, folder.name).model_id}"


def test_promotion_keeps_the_previous_champion_and_reuses_versions(
    tracking: str, exported: Callable[[Variant], Path]
) -> None:
    assert champion("tiny") is None
    first = _logged(exported(Eager()))
    second = _logged(exported(OnnxRuntime()))
    assert promote(first, "tiny", "the first").previous is None
    assert promote(second, "tiny", "faster").previous == "1"
    assert promote(first, "tiny", "back again").version == "1"
    assert champion("tiny") == "1"
    client = MlflowClient()
    assert str(client.get_model_version_by_alias("tiny", "previous").version) == "2"
    assert client.get_model_version("tiny", "1").description == "back again"
    assert len(client.search_model_versions("name = 'tiny'")) == 2


def test_the_baseline_and_the_runner_up_are_registered_too(tracking: str) -> None:
    uris = [_logged(SAVED / "variant") for _ in range(3)]
    candidates = [Candidate(uri, uri, {"role": str(n)}) for n, uri in enumerate(uris)]
    done = promote_candidate(
        candidates[0], "it's ours", "why", baseline=candidates[1], challenger=candidates[2]
    )
    client = MlflowClient()
    assert {str(v.version): v.tags["role"] for v in client.search_model_versions()} == {
        done.version: "0",
        done.baseline: "1",
        done.challenger: "2",
    }
    assert placement(client.get_registered_model("it's ours")) == {
        "previous": None,
        "champion": done.version,
        "challenger": done.challenger,
    }
    again = promote_candidate(candidates[0], "it's ours", "why", baseline=candidates[1])
    assert (again.version, again.baseline, again.previous) == (done.version, done.baseline, None)


def test_an_unknown_model_is_not_promoted(tracking: str) -> None:
    with pytest.raises(TrackingError, match="was not promoted"):
        promote("models:/m-0000", "tiny", "no such model")


def in_store(uri: str) -> Path:
    """Return the folder of a logged model in the artifact store."""
    return Path(mlflow.get_logged_model(uri.removeprefix("models:/")).artifact_location)


def test_the_digest_of_a_promotion_covers_mlmodel_for_every_address(tracking: str) -> None:
    uri = _logged(SAVED / "variant")
    promotion = promote(uri, "shop", "the first")
    client = MlflowClient()
    tag = client.get_model_version("shop", promotion.version).tags[DIGEST_TAG]
    assert tag.startswith("v2:") and len(tag) == 67
    client.copy_model_version("models:/shop/1", "copied")
    client.set_model_version_tag("copied", "1", DIGEST_TAG, tag)
    for address in ("models:/shop@champion", "models:/copied/1"):
        version = load_version(resolve(address), ModelSpec(address))
        assert version.status()["digest"] == read_manifest(SAVED / "variant").digest
    assert flavor.load_model(promotion.uri).logits(["my card"]).shape == (1, 3)
    path = in_store(uri) / "MLmodel"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ArtifactError, match="the model differs from the promoted one"):
        load_version(resolve(promotion.uri), ModelSpec(promotion.uri))
    with pytest.raises(ArtifactError, match="the model differs from the promoted one"):
        flavor.load_model(promotion.uri)
    assert promote(uri, "shop", "promoted again").version == "1"
    load_version(resolve(promotion.uri), ModelSpec(promotion.uri))


def test_a_digest_of_the_old_form_is_verified_and_mlmodel_validated(tracking: str) -> None:
    uri = _logged(SAVED / "variant")
    promotion = promote(uri, "shop", "long ago")
    old = read_manifest(SAVED / "variant").digest
    client = MlflowClient()
    client.set_model_version_tag("shop", promotion.version, DIGEST_TAG, old)
    load_version(resolve(promotion.uri), ModelSpec(promotion.uri))
    edit_mlmodel(in_store(uri), in_pyfunc(loader_module="os"))
    with pytest.raises(ArtifactError, match="loader_module is os"):
        load_version(resolve(promotion.uri), ModelSpec(promotion.uri))
    edit_mlmodel(in_store(uri), in_pyfunc(loader_module="mlflow_pt_deploy.flavor"))
    client.set_model_version_tag("shop", promotion.version, DIGEST_TAG, "0" * 64)
    with pytest.raises(ArtifactError, match="the model differs from the promoted one"):
        load_version(resolve(promotion.uri), ModelSpec(promotion.uri))


def test_only_a_servable_model_is_promoted(tracking: str) -> None:
    uri = _logged(SAVED / "variant")
    edit_mlmodel(in_store(uri), in_pyfunc(config={"allow_code": True}))
    with pytest.raises(UntrustedError, match="sets allow_code: true"):
        promote(uri, "shop", "by mistake")
    edit_mlmodel(in_store(uri), in_pyfunc(config={}, code="code"))
    with pytest.raises(ArtifactError, match="code is not written"):
        promote(uri, "shop", "by mistake")
