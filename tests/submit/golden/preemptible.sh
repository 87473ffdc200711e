#!/bin/bash
#SBATCH --job-name=digits
#SBATCH --chdir="/home/me/a project"
#SBATCH --output="runs/digits/slurm-%j.log"
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --partition=scavenge
#SBATCH --qos=low
#SBATCH --signal=B:USR1@300
#SBATCH --requeue

# Rendered by hpctrain submit jobs/digits.toml
# Launcher: started by srun's pmix
echo "hpctrain: job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"

# Slurm tells this shell ahead of the time limit; ranks then save and end with 75.
launcher=
trap '[ -z "$launcher" ] || kill -USR1 "$launcher"' USR1 TERM

srun --mpi=pmix --kill-on-bad-exit=1 /home/me/venv/bin/python -m hpctrain run jobs/digits.toml --set train.steps=20 --set 'schedule.name='"'"'cosine'"'"'; echo pwned' --run-dir runs/digits/"slurm-$SLURM_JOB_ID" --no-live &
launcher=$!
# A signal ends `wait`, but not yet what it waits for.
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done
wait "$launcher"
status=$?
[ "$status" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
