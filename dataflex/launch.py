"""Start the command again under torch.distributed, by LLaMA-Factory's environment variables."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence

from dataflex import distributed
from dataflex.environment import is_on
from dataflex.errors import ConfigError

_COUNTED = ("auto", "cpu", "gpu", "xpu")
"""Words that torchrun takes in place of a number of processes; it then counts the devices itself."""
_MOST = 65536
"""Nodes, processes of a node, or restarts: more is a mistake, and would take the machine down."""


def launch(arguments: Sequence[str], needs_processes: bool = False) -> None:
    """Replace this process by torchrun if several processes are wanted; return if the work is to be done here.

    It is replaced, not waited for, so that signals and exit codes need no forwarding.

    Args:
        arguments: of the `dataflex` command.
        needs_processes: whether a launcher is needed whatever the number of devices, as for DeepSpeed.

    Raises:
        ConfigError: a variable that is needed is not set, or holds no number.
    """
    command = command_line(arguments, os.environ, _devices, needs_processes)
    if command is None:
        _require_group(os.environ)
        return
    sys.stdout.flush()  # `execve` discards what is still in the buffers
    sys.stderr.flush()
    command[3:3] = _passed_on()
    os.execve(command[0], command, environment(os.environ))


def command_line(
    arguments: Sequence[str], env: Mapping[str, str], devices: Callable[[], int], needs_processes: bool = False
) -> list[str] | None:
    """Return the command to become, as a list, or None to go on in this process.

    Args:
        arguments: of the `dataflex` command.
        env: FORCE_TORCHRUN, NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR, MASTER_PORT, RDZV_ID, MIN_NNODES,
            MAX_NNODES, MAX_RESTARTS, with LLaMA-Factory's meaning; RANK, LOCAL_RANK or WORLD_SIZE if a launcher
            started us.
        devices: counts the devices; asked only if it matters.
        needs_processes: as for `launch`.

    Raises:
        ConfigError: as `check_numbers`.
    """
    if not may_launch(env):
        return None
    if not _is_forced(env, needs_processes) and (
        is_on("USE_RAY", env=env) or is_on("USE_KT", env=env) or devices() < 2
    ):
        return None
    nodes = check_numbers(env)
    address = env.get("MASTER_ADDR", "127.0.0.1")
    port = str(_number(env, "MASTER_PORT", 0) or free_port())  # torchrun's fixed default would meet a second run's
    processes = env.get("NPROC_PER_NODE") or str(max(1, devices()))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes]
    if "RDZV_ID" in env:
        bounds = [env.get("MIN_NNODES"), env.get("MAX_NNODES")]
        command += ["--nnodes", ":".join(map(str, bounds)) if all(bounds) else str(nodes)]
        command += ["--rdzv-id", env["RDZV_ID"], "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{port}"]
        command += ["--max-restarts", str(_number(env, "MAX_RESTARTS", 0))]
    else:
        command += ["--nnodes", str(nodes), "--node-rank", str(_number(env, "NODE_RANK", 0))]
        command += ["--master-addr", address, "--master-port", port]
    return [*command, "-m", "dataflex.cli", *arguments]


def processes(env: Mapping[str, str], needs_processes: bool = False) -> int:
    """Return how many processes `launch` would start, over all nodes.

    Args:
        env: as for `command_line`.
        needs_processes: as for `launch`.

    Raises:
        ConfigError: as `check_numbers`.
    """
    if not may_launch(env):
        return 1
    count = _devices()
    if not _is_forced(env, needs_processes) and (is_on("USE_RAY", env=env) or is_on("USE_KT", env=env) or count < 2):
        return 1
    nodes, said = check_numbers(env), env.get("NPROC_PER_NODE") or ""
    return nodes * (max(1, count) if said in ("", *_COUNTED) else int(said))


def one_device(env: MutableMapping[str, str]) -> None:
    """Show this process one GPU of several, before anything has looked at them."""
    if _devices() > 1:
        env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def may_launch(env: Mapping[str, str]) -> bool:
    """Say whether no launcher has started this process yet.

    Kubernetes sets RANK and WORLD_SIZE per node, for FORCE_TORCHRUN=1 NNODES=$WORLD_SIZE NODE_RANK=$RANK; what sets
    LOCAL_RANK has started the processes already.
    """
    return "LOCAL_RANK" not in env and (_is_forced(env) or ("RANK" not in env and "WORLD_SIZE" not in env))


def check(env: Mapping[str, str], needs_processes: bool) -> None:
    """Check, for `validate`, what a launcher would be told; where that depends on the devices, it is left to `launch`.

    Raises:
        ConfigError: as `check_numbers`.
    """
    if may_launch(env) and _is_forced(env, needs_processes):
        check_numbers(env)


def refuse_several(verb: str, needs_processes: bool) -> None:
    """Refuse, for a verb that is called from Python, what the command would start processes for.

    Raises:
        ConfigError: this is one of several processes, or the command would start some, or one under a launcher.
    """
    world = distributed.number(os.environ, "WORLD_SIZE", 1, least=1)
    if world > 1:
        found = f"a process of {world} (WORLD_SIZE)"
    elif command_line([verb], os.environ, _devices, needs_processes) is None:
        _require_group(os.environ)
        return
    elif needs_processes:
        found = "deepspeed in the run file, which works under a launcher alone, and no launcher"
    elif _is_forced(os.environ):
        found = "a launcher asked for by FORCE_TORCHRUN or USE_MCA"
    else:
        found = f"{_devices()} devices"
    raise ConfigError(
        f"{verb}: found {found}; expected one process with one device, as a verb that is called from Python works in "
        f"the process that calls it. Use the command: dataflex {verb} RUN.yaml; or, to go on with one device, set "
        "CUDA_VISIBLE_DEVICES to it before torch is imported"
    )


def check_numbers(env: Mapping[str, str]) -> int:
    """Check every number that the launcher is given, and return the number of nodes.

    Raises:
        ConfigError: a variable holds no number, or one out of bounds; several nodes have no common address.
    """
    nodes = _number(env, "NNODES", 1, least=1)
    if nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise ConfigError(
            f"NNODES: found {nodes} without MASTER_ADDR and MASTER_PORT; expected both, the same on every node: "
            "otherwise each node waits at an address of its own"
        )
    _number(env, "NODE_RANK", 0, most=nodes - 1 if "RDZV_ID" not in env else _MOST)
    _number(env, "MASTER_PORT", 0, most=65535)
    if env.get("NPROC_PER_NODE") not in _COUNTED:
        _number(env, "NPROC_PER_NODE", 1, least=1)
    _number(env, "MAX_NNODES", nodes, least=_number(env, "MIN_NNODES", 1, least=1))
    _number(env, "MAX_RESTARTS", 0)
    return nodes


def _require_group(env: Mapping[str, str]) -> None:
    """Refuse a process of several that cannot find the others: torch would end in a traceback.

    Raises:
        ConfigError: what it needs is not set.
    """
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if not env.get(name)]
    if missing and ("LOCAL_RANK" in env or distributed.number(env, "WORLD_SIZE", 1) > 1):
        found = ", ".join(f"{name}={env[name]}" for name in ("LOCAL_RANK", *wanted) if env.get(name))
        raise ConfigError(
            f"environment: found {found} without {', '.join(missing)}; expected all that a launcher such as torchrun "
            "sets. Unset them to run one process, or set FORCE_TORCHRUN=1 and NPROC_PER_NODE to start several"
        )
    if not missing:
        _number(env, "MASTER_PORT", 0, least=1, most=65535)


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the processes: LLaMA-Factory's settings for the allocator, unless OPTIM_TORCH is 0."""
    tuned = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_AVOID_RECORD_STREAMS": "1"}
    return {**(tuned if is_on("OPTIM_TORCH", "1", env=env) else {}), **env}


def _passed_on() -> list[str]:
    """Return the option by which torchrun passes SIGUSR1 on to its workers, if it has one; else the signal ends it."""
    from torch.distributed.launcher.api import LaunchConfig

    if not hasattr(LaunchConfig, "signals_to_handle"):
        return []
    return ["--signals-to-handle", f"{LaunchConfig.signals_to_handle},SIGUSR1"]


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _devices() -> int:
    import torch  # seconds, and needed by what follows in any case

    return torch.accelerator.device_count()


def _is_forced(env: Mapping[str, str], needs_processes: bool = False) -> bool:
    return needs_processes or is_on("FORCE_TORCHRUN", env=env) or is_on("USE_MCA", env=env)


def _number(env: Mapping[str, str], name: str, default: int, least: int = 0, most: int = _MOST) -> int:
    """Return a number, the default for an empty text too, as scripts leave what they do not set."""
    return distributed.number(env, name, default, least, most) if env.get(name) else default
