#!/bin/bash
#SBATCH --job-name=digits
#SBATCH --output="runs/digits/slurm-%j.log"
#SBATCH --open-mode=append
#SBATCH --nodes=3
#SBATCH --ntasks=9
#SBATCH --ntasks-per-node=3
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --no-kill

# Rendered by hpctrain submit jobs/digits.toml
# Launcher: survivors live under Open MPI's mpirun alone
# If you submit it yourself, first: mkdir -p runs/digits

# Slurm tells this shell ahead of the time limit; ranks save and end with 75 then.
# A launcher loses what it is told before it has started ranks, and is told repeatedly.
launcher= told=
pass_on() {
  told=1
  if [ -n "$launcher" ]; then  # else `$!` would not be that of the launcher
    (while kill -USR1 "$launcher"; do sleep 5; done) 2>/dev/null &
  fi
}
trap pass_on USR1 TERM
end() {
  # The signal itself ends what does not listen to it yet, and so has nothing to save.
  case "$told $1" in "1 10" | "1 138" | "1 15" | "1 143") set -- 75 ;; esac
  # Back into the queue: what was told to end and has saved, and what is preempted
  # but ended before Slurm ended it. Not what was cancelled, no longer RUNNING.
  case "$1 $(scontrol -o show job "$SLURM_JOB_ID")" in
    "0 "*) ;;
    "75 "*JobState=RUNNING* | *JobState=RUNNING*PreemptTime=2*)
      scontrol requeue "$SLURM_JOB_ID" ;;
  esac
  exit "$1"
}

echo "hpctrain: job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"
run=runs/digits/"slurm-$SLURM_JOB_ID"
[ -z "$told" ] || end 75
mpirun --with-ft ulfm -n "$SLURM_NTASKS" python -m hpctrain run jobs/digits.toml --set exchange.mode=coded --set coded.root=dedicated --run-dir "$run" --no-live &
launcher=$!
[ -z "$told" ] || pass_on
# A signal ends `wait`, but not yet what it waits for.
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done
wait "$launcher"
status=$?
# srun may end with 0 although it could not start ranks.
[ "$status" != 0 ] || grep -qs '"finished": true' "$run/run.json" || status=1
end "$status"
