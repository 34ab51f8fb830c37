"""The files in deploy/: they use options, routes, and metrics that exist."""

import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from halovae.cli.main import app
from halovae.cli.serve_checks import parse_replicas
from halovae.serving.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def options() -> set[str]:
    """The options of `halovae serve`."""
    return options_of("serve")


def options_of(*command: str) -> set[str]:
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    return set(re.findall(r"--[a-z][a-z-]*", shown))


def given(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def test_the_systemd_unit_uses_options_that_exist(options: set[str]) -> None:
    unit = (DEPLOY / "halovae.service").read_text().replace("\\\n", " ")
    (start,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    used = given(shlex.split(start))
    assert used
    assert used <= options
    stop, drain = (
        float(re.findall(pattern, unit)[0]) for pattern in (r"TimeoutStopSec=(\d+)", r"--drain-timeout (\d+)")
    )
    assert stop > drain


def test_the_image_starts_with_options_that_exist(options: set[str]) -> None:
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    words = json.loads(entry)
    assert words[:2] == ["halovae", "serve"]
    assert given(words) <= options


def test_the_kubernetes_manifest_uses_options_and_routes_that_exist(options: set[str]) -> None:
    secret, service, server = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = server["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert given(container["args"]) <= options
    drain = next(float(word.partition("=")[2]) for word in container["args"] if word.startswith("--drain-timeout"))
    assert pod["terminationGracePeriodSeconds"] > drain
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert f"--admin-port={ports['admin']}" in container["args"]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/livez", "liveness": "/livez", "readiness": "/readyz"
    }  # fmt: skip
    assert {probe["port"] for probe in probes.values()} <= set(ports)
    assert service["spec"]["selector"] == server["spec"]["selector"]["matchLabels"]
    assert service["spec"]["ports"][0]["targetPort"] in ports
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    claims = {claim["metadata"]["name"] for claim in server["spec"]["volumeClaimTemplates"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]} | claims
    assert secret["metadata"]["name"] in {volume.get("secret", {}).get("secretName") for volume in pod["volumes"]}


def test_the_dashboard_draws_metrics_that_exist() -> None:
    board: dict[str, Any] = json.loads((DEPLOY / "grafana" / "halovae.json").read_text())
    drawn = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\bhalovae_[a-z_]+", target["expr"])
    }
    known = {sample.name for family in Metrics()._registry.collect() for sample in family.samples}
    declared = {family.name for family in Metrics()._registry.collect()}
    suffixes = ("", "_total", "_bucket", "_count", "_sum")
    assert drawn
    assert drawn <= known | {name + suffix for name in declared for suffix in suffixes}


def test_the_ray_job_uses_options_that_exist_and_the_version_that_is_tested() -> None:
    job = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text())
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["halovae", "dataset", "encode"]
    assert given(words[3:]) <= options_of("dataset", "encode")
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {one["image"] for group in groups for one in group["template"]["spec"]["containers"]}
    assert len(images) == 1  # all nodes need the same halovae and the same Ray
    assert cluster["rayVersion"] == version("ray")


def test_the_server_on_kuberay_uses_options_that_exist_and_what_it_declares(options: set[str]) -> None:
    documents = [*yaml.safe_load_all((DEPLOY / "kuberay-serve.yaml").read_text())]
    secret, claim, service, policy, cluster = documents
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    head, worker = (one["template"]["spec"] for one in groups)
    (front,), (rank,) = head["containers"], worker["containers"]
    command = shlex.split(front["args"][0].partition("exec ")[2])
    assert command[:2] == ["halovae", "serve"]
    assert given(command) <= options
    assert front["image"] == rank["image"]
    assert cluster["spec"]["rayVersion"] == version("ray")
    values = dict(word.split("=", 1) for word in command if "=" in word)
    assert int(values["--num-gpus"]) == int(rank["resources"]["limits"]["nvidia.com/gpu"])
    (waited_for,) = re.findall(r"get\('GPU', 0\) < (\d+)", front["args"][0])
    assert waited_for == values["--num-gpus"]  # a front that starts before them takes CPUs
    assert parse_replicas(values["--replicas"]) == (groups[1]["minReplicas"], groups[1]["maxReplicas"])
    assert head["terminationGracePeriodSeconds"] > float(values["--drain-timeout"])
    assert int(values["--port"]) == front["ports"][0]["containerPort"]
    assert service["spec"]["ports"][0]["targetPort"] == front["ports"][0]["name"]
    labels = {"ray.io/cluster": cluster["metadata"]["name"]}  # as KubeRay sets them
    assert service["spec"]["selector"] == {**labels, "ray.io/node-type": "head"}
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    assert [rule["ports"] for rule in policy["spec"]["ingress"] if "from" not in rule] == [[{"port": "http"}]]
    assert head["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert values["--output-dir"].startswith(front["volumeMounts"][0]["mountPath"])
    assert front["env"][0]["valueFrom"]["secretKeyRef"]["name"] == secret["metadata"]["name"]
