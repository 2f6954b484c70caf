"""The same job through NeMo-Run, which writes the batch script and submits it:

python recipes/slurm/nemo_run_job.py --account ACCOUNT --partition PARTITION store.path=/shared/out/slurm
"""

import argparse
from pathlib import Path

import nemo_run as run

parser = argparse.ArgumentParser()
parser.add_argument("--account", required=True)
parser.add_argument("--partition", required=True)
parser.add_argument("--nodes", type=int, default=2)
parser.add_argument("--ranks-per-node", type=int, default=2)
parser.add_argument("--job-dir", default="nemo_run", help="for scripts and logs, on a file system that all nodes share")
parser.add_argument("--dry-run", action="store_true", help="show the batch script, submit nothing")
parser.add_argument("overrides", nargs="*", help="settings, with absolute paths: ranks start in a folder of the job")
asked = parser.parse_args()

config = str(Path(__file__).with_name("config.yaml").resolve())
extract = ["extract", "--config", config, *asked.overrides]
executor = run.SlurmExecutor(
    account=asked.account,
    partition=asked.partition,
    nodes=asked.nodes,
    ntasks_per_node=asked.ranks_per_node,
    time="01:00:00",
    launcher="torchrun",
    packager=run.Packager(),  # nothing is copied: the package is installed on every node
    tunnel=run.LocalTunnel(job_dir=str(Path(asked.job_dir).resolve())),
)
script = run.Script(path="nemo_qwen_hidden", m=True, entrypoint="python", args=extract)
run.run(script, executor, name="hidden_states", dryrun=asked.dry_run, detach=True)
