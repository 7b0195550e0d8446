#!/bin/sh
# A Slurm cluster of one machine, for tests as root in a container: two cores, two GPUs that exist in name only.
#
#   tests/slurm.sh start FOLDER     installs slurm-wlm and munge with apt if they are missing and PDVIT_INSTALL_SLURM=1
#   export SLURM_CONF=FOLDER/slurm.conf
#   tests/slurm.sh stop FOLDER
set -eu
folder=$2
stop() {
    for name in slurmd slurmctld munged; do
        if [ -f "$folder/$name.pid" ]; then kill "$(cat "$folder/$name.pid")" 2>/dev/null || true; fi
    done
}
if [ "$1" = stop ]; then
    stop
    exit
fi
if ! command -v slurmctld slurmd sbatch munged >/dev/null; then
    [ "${PDVIT_INSTALL_SLURM:-}" = 1 ] || { echo "no Slurm here: apt install slurm-wlm munge" >&2; exit 3; }
    apt-get install -y --no-install-recommends slurm-wlm munge >&2
fi
[ "$(id -u)" = 0 ] || { echo "slurmd needs root" >&2; exit 3; }
mkdir -p "$folder/state" "$folder/spool"
chmod 755 "$folder"
umask 022
head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 400 "$folder/munge.key"
munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
# Ports that are free: tests may run beside another cluster.
ports=$(python3 -c 'import socket
found = [socket.socket() for _ in range(2)]
[one.bind(("", 0)) for one in found]
print(*(one.getsockname()[1] for one in found))')
printf "Name=gpu File=%s\n" /dev/null /dev/zero > "$folder/gres.conf"
cat > "$folder/slurm.conf" <<END
ClusterName=pdvit
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=${ports% *}
SlurmdPort=${ports#* }
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=2,requeue_delay=0
JobRequeue=1
KillWait=5
MinJobAge=600
ReturnToService=2
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 CPUs=${PDVIT_SLURM_CPUS:-2} Gres=gpu:2 State=UNKNOWN
PartitionName=tests Nodes=localhost Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30 State=UP
PartitionName=urgent Nodes=localhost MaxTime=INFINITE PriorityTier=9 State=UP
END
export SLURM_CONF="$folder/slurm.conf"
slurmctld
slurmd -N localhost || slurmd
for _ in $(seq 60); do
    if sinfo --noheader --format=%T 2>/dev/null | grep -q idle; then exit; fi
    sleep 0.5
done
grep -h error "$folder/slurmctld.log" "$folder/slurmd.log" >&2
stop
exit 1
