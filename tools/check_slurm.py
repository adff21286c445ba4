"""Does tools/launch/slurm.sbatch hold on a real SLURM? A cluster of two nodes on this machine trains, is told to stop, and goes on.

    apt-get install slurmctld slurmd slurm-client munge    # Debian or Ubuntu
    python tools/check_slurm.py                            # as root, a few minutes; no GPU needed

munged, slurmctld and two slurmd run out of a temporary folder; each slurmd has a host name of its own (a UTS namespace) and eight GPUs that
are no GPUs. The unchanged script is submitted for both nodes. Once it trains it gets SIGTERM, as before a time limit: it must save,
queue itself again, resume and finish, with the losses of a single process. A plain scancel must end a job for good. Everything is
ended and removed at the end, except the folder of a failed check.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import jax

from xprompt_jax.commands.train import load_config
from xprompt_jax.config import Config, to_json
from xprompt_jax.data.sources import world_pairs
from xprompt_jax.data.tokenise import tokenize
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.tokens import train_tokenizer
from xprompt_jax.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue", "unshare")
STEPS = 30


def main() -> None:
    """Parses the flags, checks, says what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for each thing that must happen")
    args = parser.parse_args()
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        sys.exit(f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid():
        sys.exit("slurmd gives its nodes names of their own: run this as root")

    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    folder.chmod(0o755)  # munge refuses a socket that others cannot reach
    try:
        check(folder, args.timeout)
    except AssertionError as e:
        sys.exit(f"{e}\n1 failed; logs are in {folder}")
    shutil.rmtree(folder)
    print("1 passed, 0 failed")


def check(folder: Path, timeout: float) -> None:
    """The whole check; raises AssertionError with what was expected."""
    config = tiny_config(folder)
    path = folder / "bin"
    path.mkdir()
    (path / "xprompt").write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m xprompt_jax "$@"\n')
    (path / "xprompt").chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{path}:{os.environ['PATH']}", "SLURM_CONF": str(folder / "slurm.conf"), "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }  # fmt: skip
    run = lambda *command: subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout
    workdir, flags = folder / "run", ("--config", str(config))

    with cluster(folder):
        wait_for(lambda: run("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], timeout, "two idle nodes")
        script = ROOT / "tools" / "launch" / "slurm.sbatch"
        job = run("sbatch", "--parsable", "--nodes=2", str(script), str(workdir), *flags).strip()
        log = lambda: (folder / f"xprompt-{job}.out").read_text() if (folder / f"xprompt-{job}.out").exists() else ""
        state = lambda: run("squeue", "-h", "-j", job, "-t", "all", "-o", "%T").strip()
        ended = lambda: state() in ("COMPLETED", "FAILED", "CANCELLED")
        try:
            wait_for(lambda: steps(workdir) or state() == "FAILED", timeout, "the first step", log)
            run("scancel", "--signal=TERM", job)
            wait_for(ended, timeout, "the end of the job", log)
            assert state() == "COMPLETED", f"the job ended as {state()}:\n{log()}"
            text = log()

            job = run("sbatch", "--parsable", "--nodes=2", str(script), str(folder / "cancelled"), *flags).strip()
            wait_for(lambda: steps(folder / "cancelled") or ended(), timeout, "the first step", log)
            run("scancel", job)
            wait_for(ended, timeout, "the end of the job", log)
            time.sleep(10)  # longer than a job that queues itself again would need to show
            assert state() == "CANCELLED" and "again" not in log(), f"the cancelled job is {state()}:\n{log()}"
        finally:
            run("scancel", "--user=root")
            wait_for(lambda: not run("squeue", "-h"), timeout, "an empty queue")

    for rank in range(2):
        assert text.count(f"process {rank} of 2") == 2, f"process {rank} of 2 did not start twice:\n{text}"
    stopped, resumed = re.search(r"stopped at step (\d+) of", text), re.search(r"resumed from step (\d+) of", text)
    assert stopped and resumed and stopped[1] == resumed[1] and 0 < int(stopped[1]) < STEPS, f"did not stop and resume:\n{text}"
    assert "queues itself again" in text, text
    assert (workdir / "model" / "config.json").exists(), f"no model:\n{text}"
    assert steps(workdir) == list(range(1, STEPS + 1)), steps(workdir)

    run("xprompt", "train", "--workdir", str(folder / "alone"), *flags)
    losses = [[m["loss"] for m in read_metrics(folder / name) if "loss" in m] for name in ("run", "alone")]
    worst = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
    assert worst < 1e-3, f"two tasks and one process differ by {worst:.1e}: {losses}"
    print(f"two tasks on two nodes, stopped at step {stopped[1]}, queued again, resumed, finished {STEPS} steps, model written; "
          f"losses within {worst:.0e} of one process")  # fmt: skip


@contextlib.contextmanager
def cluster(folder: Path):
    """A SLURM cluster of nodes n1 and n2, on loopback, while the block lasts."""
    for name in ("state", "spool/n1", "spool/n2"):
        (folder / name).mkdir(parents=True)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "hosts").write_text(Path("/etc/hosts").read_text() + "\n127.0.0.1 n1 n2\n")
    for i in range(8):
        os.mknod(folder / f"gpu{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    ports = free_ports(3)
    # cred_expire: a job that queues itself again may start after this many seconds instead of two minutes.
    (folder / "slurm.conf").write_text(textwrap.dedent(f"""\
        ClusterName=check
        SlurmctldHost={socket.gethostname()}(127.0.0.1)
        SlurmctldPort={ports[0]}
        AuthType=auth/munge
        AuthInfo=socket={folder}/munge.socket,cred_expire=5
        SlurmUser=root
        SlurmdUser=root
        StateSaveLocation={folder}/state
        SlurmdSpoolDir={folder}/spool/%n
        SlurmctldPidFile={folder}/slurmctld.pid
        SlurmdPidFile={folder}/%n.pid
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        JobAcctGatherType=jobacct_gather/none
        MpiDefault=none
        SelectType=select/cons_tres
        SelectTypeParameters=CR_Core
        SlurmdParameters=config_overrides
        KillWait=5
        GresTypes=gpu
        NodeName=n1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000 Gres=gpu:8
        NodeName=n2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000 Gres=gpu:8
        PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
        """))  # fmt: skip
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")

    munge = [f"--{name}={folder}/munge.{end}" for name, end in
             (("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))]  # fmt: skip
    node = "mount --bind hosts /etc/hosts && hostname {0} && exec slurmd -D"
    commands = {
        "munged": ["munged", "--foreground", *munge],
        "slurmctld": ["slurmctld", "-D"],
        **{name: ["unshare", "--uts", "--mount", "sh", "-c", node.format(name)] for name in ("n1", "n2")},
    }
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            out = stack.enter_context((folder / f"{name}.out").open("w"))
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            time.sleep(1)
        yield


def tiny_config(folder: Path) -> Path:
    """The configuration of a run of seconds, and its token store."""
    config: Config = load_config(ROOT / "configs" / "debug_cpu.py")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, store=str(folder / "tokens")),
        train=dataclasses.replace(config.train, init_from=None, steps=STEPS, log_every=1, eval_every=0, save_every=1000),
    )
    records = list(world_pairs(groups=8, pairs_per_group=4, size=config.model.vq.image_size, seed=0, eval_fraction=0.0))
    texts = [text for r in records for text in (r.instruction, r.reverse_instruction, r.description, r.reverse_description)]
    tokenizer = train_tokenizer(texts, num_codes=config.model.vq.num_codes, vocab_size=config.model.vocab_size)
    tokenize(records, VQGAN(config.model.vq, jax.random.key(0)), tokenizer, folder / "tokens", progress=False)
    (folder / "config.json").write_text(to_json(config))
    return folder / "config.json"


def steps(workdir: Path) -> list[int]:
    """The steps that metrics.jsonl tells of; a line that is being written does not count."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def wait_for(happened, timeout: float, what: str, log=lambda: "") -> None:
    """Waits until `happened()` is true.

    Raises:
      AssertionError: it was not, for `timeout` seconds.
    """
    end = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < end, f"waited {timeout:.0f} s in vain for {what}\n{log()}"
        time.sleep(0.5)


if __name__ == "__main__":
    main()
