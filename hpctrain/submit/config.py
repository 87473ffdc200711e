"""What a job asks Slurm for."""

from __future__ import annotations

from dataclasses import dataclass

from hpctrain.config import check, option

MOST_GB = 1_000_000
LAUNCHERS = ("auto", "srun", "mpirun")

# These values stand in `#SBATCH` lines, where no shell quotes them: what could end a line, or begin
# another option, is not allowed to begin with.
_NAME = (r"[A-Za-z0-9_.,+/@:-]*", "letters, digits and _ . , + / @ : -")
_FEATURES = (r"[A-Za-z0-9_.,+/@:&|\[\]()*-]*", "letters, digits and _ . , + / @ : - & | [ ] ( ) *")
_OF_TYPE = "[A-Za-z0-9_.-]+:[0-9]+"
_GPUS = (f"{_OF_TYPE}(,{_OF_TYPE})*", "a number, or one behind a type, as in a100:4")
_MODULE = (r"[A-Za-z0-9_][A-Za-z0-9_.+/@:-]*", "letters, digits and, behind the first, . + / @ : -")
_TIME = (r"|[0-9]+|([0-9]+-)?[0-9]+:[0-9]{2}:[0-9]{2}", "minutes, H:MM:SS or D-HH:MM:SS")
_MEMORY = (r"|[0-9]+[KMGT]?", "a number of megabytes, or one with K, M, G or T")
_SPAN = "[0-9]+(-[0-9]+(:[0-9]+)?)?"
_ARRAY = (f"|{_SPAN}(,{_SPAN})*(%[0-9]+)?", "numbers and ranges, as in 0-3,7%2")
_FOLDER = (r"|/[A-Za-z0-9_.+/@:=~-]*", "an absolute path of letters, digits and _ . + / @ : = ~ -")
_KEY = (r"[A-Za-z0-9_.-]+", "a key of the job file")


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """What `hpctrain submit` asks Slurm for; `hpctrain run` passes over it."""

    nodes: int = option(1, minimum=1)
    """Nodes of the job."""
    tasks_per_node: int = option(1, minimum=1)
    """Ranks on each node."""
    cpus_per_task: int = option(0, minimum=0)
    """Cores of each rank; 0 for what the cluster gives."""
    gpus_per_node: int | str = option(0, minimum=0, pattern=_GPUS)
    """GPUs of each node, of a type if need be."""
    memory: str = option("", pattern=_MEMORY)
    """Memory of each node; empty for what the cluster gives."""
    time: str = option("", pattern=_TIME)
    """Time limit; empty for that of the partition."""
    partition: str = option("", pattern=_NAME)
    """Queue; empty for the cluster's default, as are the next three."""
    account: str = option("", pattern=_NAME)
    """Who pays."""
    qos: str = option("", pattern=_NAME)
    """Quality of service."""
    constraint: str = option("", pattern=_FEATURES)
    """Features that nodes must have."""
    array: str = option("", pattern=_ARRAY)
    """Numbers of a job array, each a run of its own; empty for a single job."""
    array_key: str = option("seed", pattern=_KEY)
    """The key of the job file that is set to the number in the array."""
    warning_s: int = option(120, minimum=1)
    """How long before the time limit the run is told to save and end; more than a save takes."""
    requeue: bool = True
    """Whether a run that was told to end goes back into the queue, to continue."""
    launcher: str = option("auto", choices=LAUNCHERS)
    """What starts ranks; by default what the MPI library and the cluster agree on."""
    restarts: int = option(0, minimum=0)
    """How often ranks are started again within a job, from the last checkpoint, when they fail."""
    survivors: bool = False
    """Whether ranks live on when others die, as coded runs can; Open MPI's mpirun only."""
    modules: list[str] = option([], pattern=_MODULE)
    """Environment modules to load."""
    deps: str = ""
    """Folder of packages that the job needs; nodes keep a copy, and take it where they have one."""
    cache: str = option("", pattern=_FOLDER)
    """Folder for such copies on each node's own disk; empty for /var/tmp/hpctrain-UID."""
    cache_gb: float = option(20.0, above=0, maximum=MOST_GB)
    """Most that it may hold, in 10^9 bytes; what was used longest ago goes first."""

    def __post_init__(self) -> None:
        check(self)
