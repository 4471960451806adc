"""prefect.yaml says what is true: every entrypoint is a flow of that name, with parameters that it takes."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.utilities.importtools import import_object

from flows.registry import FLOWS
from ldm.recipe import load_recipe

ROOT = Path(__file__).parents[2]
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "prefect.yaml").read_text("utf-8"))["deployments"]
NAMES = [f"{deployment['entrypoint'].split('.')[1]}/{deployment['name']}" for deployment in DEPLOYMENTS]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=NAMES)
def test_entrypoint_is_the_flow_of_its_module(deployment: dict[str, Any]) -> None:
    flow = import_object(deployment["entrypoint"])
    assert isinstance(flow, Flow)
    assert deployment["entrypoint"] == f"flows.{flow.name.replace('-', '_')}.{flow.fn.__name__}"
    assert flow.name.replace("-", "_") == flow.fn.__name__


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=NAMES)
def test_parameters_fit_the_flow_and_name_a_recipe(deployment: dict[str, Any]) -> None:
    flow = import_object(deployment["entrypoint"])
    assert flow.validate_parameters(deployment["parameters"])["recipe"] == deployment["parameters"]["recipe"]
    assert load_recipe(deployment["parameters"]["recipe"]).name == deployment["parameters"]["recipe"]


def test_every_flow_and_every_promised_deployment_is_there() -> None:
    names = {f"{import_object(d['entrypoint']).name}/{d['name']}" for d in DEPLOYMENTS}
    assert len(names) == len(DEPLOYMENTS)
    assert names >= {"reproduce/demo", "train-ldm/demo", "train-ldm/celebahq", "evaluate/nightly"}
    assert {name.split("/")[0] for name in names} == set(FLOWS)


def test_nightly_scores_the_candidate_on_a_schedule() -> None:
    (nightly,) = [deployment for deployment in DEPLOYMENTS if deployment["name"] == "nightly"]
    assert nightly["parameters"]["model"] == "candidate"
    assert [set(schedule) for schedule in nightly["schedules"]] == [{"cron", "timezone"}]


def test_flows_and_their_verbs_share_their_names() -> None:
    from flows.cli import commands

    assert {commands[name].name[0] for name in FLOWS} == set(FLOWS)


def test_the_console_script_is_what_turns_foreseen_errors_into_one_message() -> None:
    from flows.cli import app, commands

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"] == {"ldm": f"{app.__module__}:{app.__name__}"}
    assert app is not commands
