"""The recipes of docs/launch.md: shells and YAML read them, and the flags are those of the job."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml

from experiments import train
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
SHELL = [text for language, text in BLOCKS if language == "bash"]


@pytest.mark.parametrize("script", SHELL)
def test_a_shell_can_read_it(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_job_of_kubernetes_and_its_service_belong_together() -> None:
    (text,) = (text for language, text in BLOCKS if language == "yaml")
    service, job = yaml.safe_load_all(text)
    name = job["metadata"]["name"]
    pods = job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == pods["subdomain"]
    assert service["spec"] == {"clusterIP": "None", "selector": {"job-name": name}}
    (command,) = pods["containers"][0]["args"]
    assert f"--coordinator={name}-0.{pods['subdomain']}:" in command
    assert f"--num_processes={job['spec']['completions']} " in command
    assert job["spec"]["completions"] == job["spec"]["parallelism"]


def test_the_flags_exist() -> None:
    used = set(
        re.findall(r"(?<=\s)--(\w+)", "".join(text for _, text in BLOCKS if "train" in text))
    )
    elsewhere = {"flagfile", "job", "nodes", "ntasks", "gpus", "signal", "requeue"}
    elsewhere |= {"zone", "worker", "command"}  # of SLURM and of gcloud
    assert used - elsewhere <= set(train.FLAGS)
    assert {"multihost", "coordinator", "num_processes", "process_id"} <= used
