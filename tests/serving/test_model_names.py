"""Words of the command line to names of models."""

import pytest

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.model_names import name_models


def test_names_of_models() -> None:
    words = ["models:/a@champion", "b=models:/a/3", "models:/c/latest", "some/folder/", "@x.json"]
    assert list(name_models(words, None)) == ["a", "b", "c", "folder", "x.json"]
    with pytest.raises(ServingError, match="two models are called a"):
        name_models(["models:/a@x", "models:/a@y"], None)
    with pytest.raises(ServingError, match="model_config has no threads"):
        name_models(["models:/a@x"], {"threads": 2})
    with pytest.raises(ServingError, match="nothing to serve"):
        name_models([], None)
