"""Ids are checked wherever they come from; what `status` and `ls` report turns into plain data."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from typing import Any

import pytest

from lxc_pool.model import ContainerId, ContainerInfo, PoolStatus, ProfileStatus, State, check_id


def test_an_id_made_for_a_job_names_job_time_and_process() -> None:
    before = int(time.time())
    identity = ContainerId.create("123-name")
    assert identity.job_id == "123-name"
    assert before <= identity.creation_time <= int(time.time())
    assert identity.pid == os.getpid()
    assert str(identity) == f"test_123-name_{identity.creation_time}_{os.getpid()}"


def test_a_job_may_be_a_number() -> None:
    assert ContainerId.create(7).job_id == "7"


@pytest.mark.parametrize("value", ["x", "a b/../c", "ü", "x" * 128, 0, -(2**63), 2**64 - 1, ContainerId("j", 1, 2)])
def test_takes_data_of_any_look_as_an_id(value: Any) -> None:
    assert check_id(value) is value


@pytest.mark.parametrize(
    "value",
    [
        None,
        1.5,
        True,
        b"x",
        ["x"],
        ("j", 1, 2),
        ContainerId("j", "now", 2),  # type: ignore[arg-type]  # the point
        ContainerId("j", 1, True),
        ContainerId(None, 1, 2),  # type: ignore[arg-type]  # the point
        ContainerId(7, 1, 2),  # type: ignore[arg-type]  # the point: `create` takes a number, the field does not
    ],
)
def test_refuses_an_id_of_another_type(value: Any) -> None:
    with pytest.raises(TypeError, match="id"):
        check_id(value)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "x" * 129,
        "a\nb",
        "a\0b",
        "\x1b[31m",
        2**64,
        -(2**63) - 1,
        ContainerId("", 1, 2),
        ContainerId("j" * 120, 1, 2),
    ],
)
def test_refuses_an_id_that_could_not_be_shown_or_sent(value: Any) -> None:
    with pytest.raises(ValueError, match="id must"):
        check_id(value)


def test_a_refused_id_is_quoted_but_not_at_any_length() -> None:
    with pytest.raises(ValueError, match="xxx") as caught:
        check_id("x" * 1_000_000)
    assert len(str(caught.value)) < 400


def test_the_status_is_plain_data_all_the_way_down() -> None:
    profile = ProfileStatus(5, 4, 1, 0, 2, 0, 0, 3, "busybox:1")
    values: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(PoolStatus)}
    status = PoolStatus(**values | {"running": True, "leased": 2, "last_error": None, "profiles": {"default": profile}})
    document = json.loads(json.dumps(status.as_dict()))
    assert document["profiles"]["default"]["image"] == "busybox:1"
    assert (document["running"], document["last_error"], document["leased"]) == (True, None, 2)


@pytest.mark.parametrize(
    ("identity", "shown"), [(ContainerId("j", 1, 2), "test_j_1_2"), ("x", "x"), (5, 5), (None, None)]
)
def test_a_container_is_plain_data_with_its_id_written_out(identity: Any, shown: object) -> None:
    info = ContainerInfo("n", "default", State.LEASED, identity, 1, 0, 0.5, 2, None)
    document = json.loads(json.dumps(info.as_dict()))
    assert document == {
        "name": "n",
        "profile": "default",
        "state": "leased",
        "id": shown,
        "owner_pid": 1,
        "owner_uid": 0,
        "age": 0.5,
        "init_pid": 2,
        "reason": None,
    }
    assert type(info.as_dict()["state"]) is str
