"""Jobs of tools/slurm.sh under Debian's Slurm, whose daemons these tests start and stop."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment, losses, only_log, tiny_flags, train

from tools.audit import objections
from tools.runs import read_log

SBIN = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
DAEMONS = {"munged": ["-F", "--force"], "slurmctld": ["-D"], "slurmd": ["-D"]}
LIMITS = 3  # times that the job reaches its time limit


def wait_for(condition, what: str, seconds: int = 300):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return found


@pytest.fixture
def slurm(tmp_path):
    """A function that runs one of Slurm's commands on a cluster of this machine alone."""
    if missing := [name for name in DAEMONS if not shutil.which(name, path=SBIN)]:
        pytest.skip(f"no {', '.join(missing)}; apt install slurm-wlm munge")
    host, user = socket.gethostname().partition(".")[0], getpass.getuser()
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    (tmp_path / "key").write_bytes(os.urandom(1024))
    (tmp_path / "key").chmod(0o400)
    for name in ("state", "spool", "job"):
        (tmp_path / name).mkdir()
    config = f"""ClusterName=test
        SlurmctldHost={host}(127.0.0.1)
        SlurmUser={user}
        SlurmdUser={user}
        AuthInfo=socket={tmp_path}/munge,cred_expire=5
        SlurmctldPort={ports[0]}
        SlurmdPort={ports[1]}
        SlurmctldPidFile={tmp_path}/slurmctld.pid
        SlurmdPidFile={tmp_path}/slurmd.pid
        StateSaveLocation={tmp_path}/state
        SlurmdSpoolDir={tmp_path}/spool
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        ReturnToService=2
        NodeName={host} NodeAddr=127.0.0.1 CPUs=2
        PartitionName=all Nodes={host} Default=YES
        """
    (tmp_path / "slurm.conf").write_text("\n".join(map(str.strip, config.splitlines())))
    files = {"--key-file": "key", "--socket": "munge", "--pid-file": "munged.pid",
             "--log-file": "munged.log", "--seed-file": "seed"}  # fmt: skip
    DAEMONS["munged"][2:] = [f"{flag}={tmp_path / name}" for flag, name in files.items()]
    environment = clean_environment(PATH=SBIN, SLURM_CONF=str(tmp_path / "slurm.conf"))

    def command(*words) -> str:
        done = subprocess.run(words, env=environment, cwd=tmp_path / "job", capture_output=True,
                              text=True)  # fmt: skip
        return done.stdout.strip()

    with ExitStack() as started:
        for name, flags in DAEMONS.items():
            output = started.enter_context((tmp_path / f"{name}.out").open("w"))
            process = subprocess.Popen(
                [name, *flags], env=environment, stdout=output, stderr=output
            )
            started.callback(process.wait)
            started.callback(process.terminate)
            if name == "munged":
                wait_for((tmp_path / "munge").exists, name)
        wait_for(lambda: command("sinfo", "-h", "-o", "%T") == "idle", "an idle node")
        yield command
        command("scancel", "--full", "--signal=KILL", f"--user={user}")


@pytest.mark.slow
def test_a_requeued_job_ends_with_the_losses_of_an_undisturbed_run(slurm, shards, tmp_path):
    """Requeued once by scontrol, then by its time limit. A file makes the job's steps slow."""
    flags = [*tiny_flags(shards, tmp_path / "whole"), "--num_steps=500", "--max_epochs=99"]
    assert train(flags, ranks=2).returncode == 0
    whole, folder = losses(only_log(tmp_path / "whole")), tmp_path / "job"
    for name in ("run.sh", "kernels.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "referee", folder / "referee")
    shutil.copytree(ROOT / "data", folder / "data", ignore=shutil.ignore_patterns("*.bin"))
    source, step = (ROOT / "train_gpt.py").read_text(), "self.update(step, batches)"
    slow = f'time.sleep(0.5 * Path("{folder}/slow").exists()) or {step}'
    assert step in source
    (folder / "train_gpt.py").write_text(source.replace(step, slow))
    (folder / "slow").touch()
    flags = [flag for flag in flags if not flag.startswith("--log_dir")]
    job = slurm("env", "PET_NPROC_PER_NODE=2", "sbatch", "--parsable", "--gpus-per-node=0",
                "--time=4", ROOT / "tools/slurm.sh", *flags)  # fmt: skip

    def logs() -> list[Path]:
        return sorted(folder.glob("logs/*/*.txt"))

    def restarts(count: int) -> bool:
        return f" Restarts={count} " in slurm("scontrol", "show", "job", job)

    wait_for(lambda: logs() and ("train", 5) in losses(logs()[0]), "step 5")
    slurm("scontrol", "requeue", job)
    wait_for(lambda: restarts(1 + LIMITS), "its time limits")
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    (folder / "slow").unlink()
    wait_for(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", job), "its end")
    found = {}
    for number, log in enumerate(logs()):
        run, last = read_log(log), number == 1 + LIMITS
        found |= losses(log)
        assert found == {key: whole[key] for key in found}, log
        assert (run.result["status"] == "aborted") == (not last)
        assert (f'"SLURM_RESTART_COUNT": "{number}"' in run.environment["variables"]) == bool(
            number
        )
        assert any("requeued" in reason for reason in objections([run])) == bool(number)
    assert last and found == whole
