"""Job files of `examples/cluster/`: linted, held against the schemas of what reads them, and run as far as one can."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflex.launch import free_port
from tests.processes import environment

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "cluster"
SCRIPTS = {path.name: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.sbatch"))}
SKY = yaml.safe_load((FOLDER / "train.sky.yml").read_text("utf-8"))
KUBERNETES = yaml.safe_load((FOLDER / "featurize.k8s.yml").read_text("utf-8"))
[CONTAINER] = KUBERNETES["spec"]["template"]["spec"]["containers"]


@pytest.mark.parametrize("name", [*SCRIPTS, "sky run", "sky setup", "kubernetes"])
def test_shellcheck_finds_nothing(name: str) -> None:
    if (tool := shutil.which("shellcheck", path=environment()["PATH"])) is None:
        pytest.skip("there is no shellcheck; `pip install -e '.[dev]'` brings it")
    found = {**SCRIPTS, "sky run": SKY["run"], "sky setup": SKY["setup"], "kubernetes": CONTAINER["command"][2]}
    ran = subprocess.run([tool, "--shell", "bash", "-"], input=found[name], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_sbatch_options_are_before_the_first_command() -> None:
    """SLURM reads none behind it."""
    for name, text in SCRIPTS.items():
        lines = text.splitlines()
        first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
        assert lines[0] == "#!/usr/bin/env bash", name
        assert [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")][-1] < first, name


def test_codes_that_no_try_mends_end_the_job_of_kubernetes() -> None:
    from dataflex import errors

    rules = KUBERNETES["spec"]["podFailurePolicy"]["rules"]
    [ending] = [rule["onExitCodes"] for rule in rules if rule["action"] == "FailJob"]
    assert ending["containerName"] == CONTAINER["name"]
    kinds = (errors.ConfigError, errors.MismatchError, errors.CorruptionError)
    assert ending["values"] == sorted(kind.exit_code for kind in kinds)
    assert SKY["resources"]["job_recovery"]["recover_on_exit_codes"] == [errors.Interrupted.exit_code]


def isolated(*command: str) -> subprocess.CompletedProcess[str]:
    """Run what conflicts with our versions in an environment of its own; needs the package index, or uv's cache."""
    if (tool := shutil.which("uv")) is None:
        pytest.skip("there is no uv to install with; `make` brings one")
    run = [tool, "run", "--quiet", "--isolated", "--no-project", "--python", sys.executable]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([*run, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    if ran.returncode and re.search("Failed to fetch|error sending request", ran.stderr):
        pytest.skip(f"the package index cannot be reached: {ran.stderr.strip().splitlines()[-1]}")
    return ran


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_kubernetes_knows_every_key(tmp_path: Path) -> None:
    command = ["--with", "kubernetes-validate==1.37.0", "kubernetes-validate", "--strict"]
    ran = isolated(*command, str(FOLDER / "featurize.k8s.yml"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    wrong = tmp_path / "wrong.yml"
    wrong.write_text((FOLDER / "featurize.k8s.yml").read_text("utf-8").replace("completionMode", "completionsMode"))
    assert isolated(*command, str(wrong)).returncode != 0


READ = """
import sys, sky
from sky.utils import yaml_utils
task = sky.Task.from_yaml_config(yaml_utils.read_yaml(sys.argv[1]), {"RUN": "run.yaml"})
[resources] = task.resources
print(task.run, resources.use_spot, resources.job_recovery["recover_on_exit_codes"])
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_skypilot_reads_its_file(tmp_path: Path) -> None:
    command = ["--with", "skypilot==0.14.1", "python", "-c", READ]
    ran = isolated(*command, str(FOLDER / "train.sky.yml"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{SKY['run']} True [75]\n"
    wrong = tmp_path / "wrong.yml"
    wrong.write_text((FOLDER / "train.sky.yml").read_text("utf-8").replace("job_recovery", "jobs_recovery"))
    assert isolated(*command, str(wrong)).returncode != 0


SRUN = """#!/usr/bin/env bash
# As many tasks as nodes, on this machine; a signal goes to each. Its exit code is the highest.
tasks=()
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
echo $$ > "$SLURM_STATE/srun.pid"
highest=0
for task in "${tasks[@]}"; do
	while wait "$task"; code=$?; kill -0 "$task" 2>/dev/null; do :; done # a signal ends `wait` before the task
	if [ "$code" -gt "$highest" ]; then highest=$code; fi
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
show) echo 127.0.0.1 && echo 127.0.0.2 ;;
requeue) echo "$2" >> "$SLURM_STATE/requeued" ;;
esac
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_of_two_nodes_is_queued_again_on_75_alone_and_goes_on(workspace: Any) -> None:
    """With SLURM first, which stops it in a step; to its end as SkyPilot has it, on the same two processes."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (workspace.folder / name).write_text(text)
        (workspace.folder / name).chmod(0o755)
    env = environment(
        SLURM_STATE=str(workspace.folder),
        SLURM_NNODES="2",
        SLURM_JOB_NODELIST="node[0-1]",
        SLURM_JOB_ID="17",
        MASTER_PORT=str(free_port()),
        NPROC_PER_NODE="1",
    )
    env["PATH"] = f"{workspace.folder}{os.pathsep}{env['PATH']}"
    section = {"store": str(workspace.folder / "store")}
    keys = {"component_name": "random", "update_times": 30, "save_strategy": "no", "save_steps": None}
    path = workspace.write("run", dataflex=section, **keys)
    out = workspace.folder / "out" / "job"
    batch = ["bash", str(FOLDER / "train.sbatch"), str(out), str(path)]
    requeued = workspace.folder / "requeued"

    job = subprocess.Popen(batch, env=env, stderr=subprocess.PIPE, text=True)
    while not (out / "trainer_log.jsonl").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    os.kill(int((workspace.folder / "srun.pid").read_text()), signal.SIGUSR1)
    _, said = job.communicate(timeout=400)
    assert job.returncode != 0, said
    assert json.loads((out / "status.json").read_text("utf-8"))["exit_code"] == 75, said
    assert requeued.read_text() == "17\n"
    assert len(list(out.glob("checkpoint-*"))) == 1

    refused = subprocess.run([*batch, "learning_rate=much"], env=env, capture_output=True, text=True)
    assert refused.returncode == 2, refused.stderr
    assert requeued.read_text() == "17\n"  # although the status file is the one of before

    env |= {"RUN": str(path), "OUTPUT": str(out), "NPROC_PER_NODE": "2"}
    uploading = "code=$?; echo uploaded; exit $code"  # what SkyPilot adds to it, as far as it matters
    ran = subprocess.run(["bash", "-c", SKY["run"] + uploading], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("uploaded\n")
    assert json.loads((out / "status.json").read_text("utf-8"))["state"] == "finished"
    logged = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text("utf-8").splitlines()]
    steps = [line["current_steps"] for line in logged]
    assert steps == sorted(steps)  # none was done again
    assert set(steps) == set(range(1, 64))
