"""Messages keep every row; the sample is a fair share, and the same for the same id."""

from contextlib import closing
from pathlib import Path

import pytest

from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.serving.rollout.shadow.message import (
    MAX_BYTES,
    Sample,
    new_address,
    new_socket,
    pack,
    sampling_point,
    unpack,
)

TEXT = '{"label": "red \\u00e9", "score": 0.5}'


@pytest.mark.parametrize("rows", [["red", "", "שלום", "\ud800 lone"], [b"\x89PNG\x00", b""]])
def test_a_message_is_read_as_it_was_written(rows: list[Row]) -> None:
    first = Sample("tiny", "3", 0.25, [TEXT] * len(rows), rows)
    second = Sample("other", "1", 0.5, [TEXT], ["last"])
    assert unpack(pack([first, second])) == [first, second]
    assert first.labels == ["red é"] * len(rows)


def test_the_best_of_several_labels_is_taken() -> None:
    assert Sample("tiny", "3", 0.0, [f"[{TEXT}, {TEXT[:-2]}1}}]"], ["x"]).labels == ["red é"]


def test_ids_are_sampled_in_proportion() -> None:
    points = [sampling_point(f"4f1e-{number:x}") for number in range(4000)]
    assert points == [sampling_point(f"4f1e-{number:x}") for number in range(4000)]
    for share in (0.01, 0.2, 0.9):
        assert sum(point < share for point in points) / 4000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("depth", [0, 40])
def test_the_longest_message_passes_whatever_the_folder_is_called(
    tmp_path: Path, depth: int
) -> None:
    folder = tmp_path.joinpath(*["folder"] * depth)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        closing(new_address(folder)) as address,
        new_socket() as receiver,
        new_socket() as sender,
    ):
        receiver.bind(address.path)
        sender.sendto(b"x" * MAX_BYTES, address.path)
        assert len(receiver.recv(2 * MAX_BYTES)) == MAX_BYTES
