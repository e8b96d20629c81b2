"""Plans of shadows: the share that is sampled, labels that differ."""

import json

from mlflow_pt_deploy.serving.rollout.shadow.plan import (
    SHADOW,
    TEACHER,
    ShadowPlan,
    ShadowTarget,
    label_problem,
)


def test_a_plan_samples_as_much_as_its_targets_want() -> None:
    targets = (
        ShadowTarget(TEACHER, "b", 0.01, "1"),
        ShadowTarget(SHADOW, "a", 0.2, "4"),
        ShadowTarget(SHADOW, "a", 1.0, problem="absent"),
    )
    plan = ShadowPlan("tiny", "3", ("red", "green"), "text", {"num_threads": 2}, 0.98, targets)
    assert plan.share == 0.2
    assert [target.version for target in plan.active] == ["1", "4"]
    assert ShadowPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert ShadowPlan("tiny", "3", (), "text").share == 0


def test_labels_that_differ_are_named() -> None:
    assert label_problem(["red", "green"], ["green", "red"]) == ""
    assert label_problem(["red", "green"], ["green", "maroon"]) == (
        "its labels differ: it lacks red, it adds maroon. Shadow a version with the same labels."
    )
    many = [str(number) for number in range(9)]
    assert "it adds 0, 1, 2 and 6 more" in label_problem([], many)
