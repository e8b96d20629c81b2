"""Model arguments of the command line: their names, and errors for models that do not exist."""

from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_pt_deploy.cli import main
from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.registry.addresses import explain_load_error
from mlflow_pt_deploy.serving.api import serve
from mlflow_pt_deploy.serving.model_names import name_models, registered_names


def test_names_of_models() -> None:
    words = ["models:/a@champion", "b=models:/a/3", "models:/c/latest", "some/folder/", "@x.json"]
    assert list(name_models(words, None)) == ["a", "b", "c", "folder", "x.json"]
    with pytest.raises(ServingError, match="two models are called a"):
        name_models(["models:/a@x", "models:/a@y"], None)
    with pytest.raises(ServingError, match="model_config has no threads"):
        name_models(["models:/a@x"], {"threads": 2})
    with pytest.raises(ServingError, match="nothing to serve"):
        name_models([], None)


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").touch()
    for word, message in (
        (f"{tmp_path}/none", f"the model {tmp_path}/none is not there. Give a folder that MLflow"),
        (f"shop={tmp_path}", "is no MLflow model: it has no file MLmodel. Give a folder"),
        (__file__, "is not a folder. Give a folder"),
        (f"{tmp_path}/hub", "with pt-deploy optimize --model"),
    ):
        assert main(["serve", word]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("models:/none@champion", "Registered Model with name=none not found. Check its addr"),
        ("models:/shop@champion", "Registered model alias champion not found. Check its addr"),
        ("models:/shop/9", "Model Version (name=shop, version=9) not found. Check"),
        ("file:///no/such", "/no/such does not exist. Check"),
    ],
)
def test_a_model_unknown_to_the_registry(tracking: str, uri: str, reason: str) -> None:
    MlflowClient().create_registered_model("shop")
    (model,) = name_models([uri]).values()
    with pytest.raises(MlflowException) as info:
        model.open()
    message = str(explain_load_error(info.value))
    assert message.startswith("the model cannot be fetched or opened: ")
    assert reason in message


def test_the_whole_reason_is_on_one_line() -> None:
    error = MlflowException("These failed:\n\n  ## a ##\nno such file\nTraceback (most")
    assert "opened: These failed: a no such file. Check its" in str(explain_load_error(error))
    assert "opened: KeyError. Check" in str(explain_load_error(KeyError()))


def test_registered_models_are_named(tmp_path: Path) -> None:
    file = tmp_path / "target.json"
    file.write_text('{"uri": "models:/c/3"}')
    words = ["models:/a@champion", "shop=models:/b/Production", f"@{file}", str(tmp_path)]
    assert registered_names(words) == {"a", "b", "c"}


def test_a_canary_of_a_model_that_is_not_served_is_refused_at_the_start() -> None:
    with pytest.raises(
        ServingError, match="canary is models:/b@challenger, but this server serves a"
    ):
        serve("models:/a@champion", canary="models:/b@challenger=5%")
