#!/usr/bin/env bash
# A real SLURM of one node for tests: root, Debian's packages, no systemd, no cgroups, loopback only.
#
#   experiments/slurm/one_node.sh install        apt-get install slurm-wlm and munge, and try them
#   eval "$(experiments/slurm/one_node.sh start DIR)"
#   experiments/slurm/one_node.sh stop DIR
#
# Nothing outside DIR is written. Jobs run as root. SLURM keeps no accounts here, so that `sacct`
# has no answer and submitit would wait for a dead job for ever: DIR/bin/sacct asks scontrol instead.
set -euo pipefail

fail() { echo "one_node.sh: $*" >&2; exit 1; }

place() { # DIR: absolute paths of everything
    dir=$(mkdir -p "$1" && cd "$1" && pwd)
    node=$(hostname -s)
    socket=$dir/munge.socket
    export SLURM_CONF=$dir/slurm.conf
}

configure() {
    local memory
    memory=$(awk '/^MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    mkdir -p "$dir/state" "$dir/spool" "$dir/bin"
    cat > "$SLURM_CONF" <<END
ClusterName=deltalab
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=${SLURM_TEST_PORT:-16917}
SlurmdPort=$((${SLURM_TEST_PORT:-16917} + 1))
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$socket,cred_expire=10
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
# no cgroups, no accounting, no mail; a requeued job waits for cred_expire seconds
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
# cores and memory are what is given out; schedule often; remember finished jobs for the test
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=1,bf_interval=2
KillWait=5
MinJobAge=7200
ReturnToService=2
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=test Nodes=$node Default=YES MaxTime=INFINITE State=UP
END
    cat > "$dir/bin/sacct" <<'END'
#!/usr/bin/env python3
"""Answers `sacct -o JobID,State,NodeList --parsable2 -j ID [-j ID ...]` from scontrol."""

import subprocess
import sys

jobs = [value for flag, value in zip(sys.argv, sys.argv[1:]) if flag == "-j"]
print("JobID|State|NodeList")
for job in jobs:
    show = ["scontrol", "--oneliner", "show", "job", job]
    for line in subprocess.run(show, capture_output=True, text=True).stdout.splitlines():
        about = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "JobId" not in about:
            continue
        name, task = about["JobId"], about.get("ArrayTaskId")
        if task is not None:
            name = f"{about['ArrayJobId']}_{task if task.isdigit() else f'[{task}]'}"
        print(name, about["JobState"], about.get("NodeList", ""), sep="|")
END
    chmod +x "$dir/bin/sacct"
}

install() {
    local name patience=(-o Acquire::Retries=1 -o Acquire::http::Timeout=20)
    if command -v slurmctld munged > /dev/null; then return; fi
    for name in id apt-get timeout; do command -v $name > /dev/null || fail "needs $name"; done
    [ "$(id -u)" = 0 ] || fail "must be root"
    export DEBIAN_FRONTEND=noninteractive
    timeout 120 apt-get "${patience[@]}" update -qq || fail "apt-get update"
    timeout 240 apt-get "${patience[@]}" install -qq -y --no-install-recommends \
        slurm-wlm munge > /dev/null || fail "apt-get install slurm-wlm munge"
}

start() {
    [ "$(id -u)" = 0 ] || fail "must be root"
    command -v slurmctld munged > /dev/null || fail "needs slurm-wlm and munge: $0 install"
    place "$1"
    configure
    (umask 077 && head -c 1024 /dev/urandom > "$dir/munge.key")
    chmod 755 "$dir"
    munged --force --key-file="$dir/munge.key" --socket="$socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" >&2 || fail "munged"
    slurmctld -c -f "$SLURM_CONF" >&2 || fail "slurmctld: $dir/slurmctld.log"
    slurmd -f "$SLURM_CONF" -N "$node" >&2 || fail "slurmd: $dir/slurmd.log"
    for _ in $(seq 100); do
        if [ "$(sinfo --noheader -o %T 2> /dev/null)" = idle ]; then
            echo "export SLURM_CONF=$SLURM_CONF PATH=$dir/bin:\$PATH"
            return
        fi
        sleep 0.2
    done
    fail "the node does not become idle: $dir/slurmctld.log, $dir/slurmd.log"
}

stop() {
    local name process
    place "$1"
    scancel --user=root 2> /dev/null || true
    for _ in $(seq 50); do # slurmd does not end while a job does not
        if [ -z "$(squeue --noheader 2> /dev/null)" ]; then break; fi
        sleep 0.2
    done
    for name in slurmd slurmctld munged; do
        if [ ! -f "$dir/$name.pid" ]; then continue; fi
        process=$(cat "$dir/$name.pid")
        kill "$process" 2> /dev/null || true
        for _ in $(seq 50); do
            if ! kill -0 "$process" 2> /dev/null; then break; fi
            sleep 0.1
        done
        kill -KILL "$process" 2> /dev/null || true
    done
}

case "${1:-}" in
    install)
        install
        trial=$(mktemp -d)
        trap 'rm -rf "$trial"' EXIT
        "$0" start "$trial" > /dev/null
        "$0" stop "$trial"
        ;;
    start | stop) "$1" "${2:?DIR}" ;;
    *) fail "usage: one_node.sh install | start DIR | stop DIR" ;;
esac
