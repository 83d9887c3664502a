#!/usr/bin/env bash
# A real two-node run on one machine: `deepspeed --hostfile` over two network namespaces, each with an sshd of its own,
# must give the same losses as two ranks on one node.
#
#   make test-two-nodes        (or: bash tests/cluster/two_nodes.sh)
#
# Needs root, and: apt-get install openssh-server pdsh iproute2
# Touches nothing outside a temporary folder and two namespaces, removes both at the end, and ends only processes that
# live in those namespaces. No packet leaves them.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$ROOT"
PYTHON=${PYTHON:-$(command -v python)}
STEPS=${STEPS:-5}

for tool in sshd ssh ssh-keygen pdsh ip; do
    if ! PATH="$PATH:/usr/sbin:/sbin" command -v "$tool" > /dev/null; then
        echo "error: $tool is missing; apt-get install openssh-server pdsh iproute2" >&2
        exit 2
    fi
done
if [ "$(id -u)" != 0 ]; then
    echo "error: making network namespaces needs root; run it as root or under sudo -E" >&2
    exit 2
fi
export PATH="$PATH:/usr/sbin:/sbin"
SSH=$(command -v ssh)
SSHD=$(command -v sshd)

WORK=$(mktemp -d /tmp/quincunx-two-nodes.XXXXXX)
NAMES=("qx-$$-a" "qx-$$-b")
ADDRESSES=(10.213.77.1 10.213.77.2)
CARD=qx0 # the name of the network card in both namespaces
MADE=()
MADE_RUN_SSHD=no

clean_up() {
    for name in "${MADE[@]}"; do
        for pid in $(ip netns pids "$name"); do
            kill -KILL "$pid" 2> /dev/null || true
        done
        ip netns delete "$name"
    done
    if [ "$MADE_RUN_SSHD" = yes ]; then rmdir /run/sshd || true; fi
    rm -rf "$WORK"
}
trap clean_up EXIT

echo "== two namespaces, a cable between them, an sshd in each"
if [ ! -d /run/sshd ]; then # sshd's empty folder for its unprivileged half
    mkdir -m 755 /run/sshd
    MADE_RUN_SSHD=yes
fi
ssh-keygen -q -t ed25519 -N '' -f "$WORK/host_key"
ssh-keygen -q -t ed25519 -N '' -f "$WORK/user_key"
for node in 0 1; do
    ip netns add "${NAMES[$node]}"
    MADE+=("${NAMES[$node]}")
    ip -n "${NAMES[$node]}" link set lo up
done
ip -n "${NAMES[0]}" link add "$CARD" type veth peer name "$CARD" netns "${NAMES[1]}"
for node in 0 1; do
    ip -n "${NAMES[$node]}" address add "${ADDRESSES[$node]}/30" dev "$CARD"
    ip -n "${NAMES[$node]}" link set "$CARD" up
    cat > "$WORK/sshd_config_$node" << EOF
ListenAddress ${ADDRESSES[$node]}
Port 2222
HostKey $WORK/host_key
PidFile none
AuthorizedKeysFile $WORK/user_key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
PermitUserEnvironment no
EOF
    ip netns exec "${NAMES[$node]}" "$SSHD" -f "$WORK/sshd_config_$node" -E "$WORK/sshd_$node.log"
done
cat > "$WORK/ssh_config" << EOF
Host ${ADDRESSES[*]}
    User root
    Port 2222
    IdentityFile $WORK/user_key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile $WORK/known_hosts
    LogLevel ERROR
EOF
# deepspeed and pdsh call `ssh` by name: this one reads our configuration instead of the user's.
mkdir "$WORK/bin"
printf '#!/bin/sh\nexec %s -F %s "$@"\n' "$SSH" "$WORK/ssh_config" > "$WORK/bin/ssh"
chmod +x "$WORK/bin/ssh"

echo "== shards"
"$PYTHON" - "$WORK/corpus.jsonl" docs/*.md LICENSE << 'EOF'
import json, sys
with open(sys.argv[1], "w") as file:
    for path in sys.argv[2:]:
        paragraphs = [" ".join(part.split()) for part in open(path, encoding="utf-8").read().split("\n\n") if part.strip()]
        file.write(json.dumps({"doc_id": path, "title": path, "paragraphs": paragraphs}) + "\n")
EOF
"$PYTHON" launchers/build_shards.py --format documents --path "$WORK/corpus.jsonl" --output "$WORK/shards" \
    --tokenizer train:1000 --max_tokens 48 --held_out_share 0 > "$WORK/build.log" 2>&1 || { cat "$WORK/build.log"; exit 1; }

cat > "$WORK/recipe.yaml" << EOF
shards: [$WORK/shards]
encoder: bert
from_scratch: true
hidden_size: 64
num_layers: 2
num_heads: 2
intermediate_size: 128
max_positions: 48
max_tokens: 48
tasks: [mkp, cmp, npr]
decoder: enhanced
learning_rate: 1.0e-3
global_batch: 8
steps: $STEPS
log_every: 1
held_out_every: 0
tracking: none
export: false
device: cpu
EOF
LAUNCHER=$(dirname "$PYTHON")/deepspeed
ARGUMENTS=(launchers/pretrain.py --deepspeed "$ROOT/ds_configs/zero2.json" --recipe "$WORK/recipe.yaml")
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PATH="$WORK/bin:$PATH"

echo "== two ranks on one node"
"$LAUNCHER" --hostfile "$WORK/none" --num_gpus 2 "${ARGUMENTS[@]}" --output "$WORK/one" > "$WORK/one.log" 2>&1 ||
    { cat "$WORK/one.log"; exit 1; }

echo "== one rank on each of two nodes"
printf '%s slots=1\n' "${ADDRESSES[@]}" > "$WORK/hostfile"
# What the ranks of the other node need in their environment; gloo must be told which card leads to the others.
printf '%s\n' "GLOO_SOCKET_IFNAME=$CARD" OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu "PATH=$PATH" > "$WORK/ds_env"
DS_ENV_FILE="$WORK/ds_env" ip netns exec "${NAMES[0]}" "$LAUNCHER" --hostfile "$WORK/hostfile" \
    --master_addr "${ADDRESSES[0]}" "${ARGUMENTS[@]}" --output "$WORK/two" > "$WORK/two.log" 2>&1 ||
    { cat "$WORK/two.log" "$WORK"/sshd_*.log; exit 1; }
grep -q "node_rank=1" "$WORK/two.log" || { echo "error: no second node took part"; cat "$WORK/two.log"; exit 1; }

"$PYTHON" - "$WORK/one" "$WORK/two" "$STEPS" << 'EOF'
import sys
from pathlib import Path

from quincunx.engine.tracking import read_metrics

one, two = (
    {line["step"]: line for line in read_metrics(Path(folder)) if line["kind"] == "train"} for folder in sys.argv[1:3]
)
assert sorted(one) == sorted(two) == list(range(1, int(sys.argv[3]) + 1)), (sorted(one), sorted(two))
names = sorted(name for name in one[1] if name.startswith("loss/"))
print("step  " + "  ".join(f"{name:>22}" for name in names) + "     (one node / two nodes)")
worst = 0.0
for step in sorted(one):
    print(f"{step:>4}  " + "  ".join(f"{one[step][name]:>10.6f} /{two[step][name]:>10.6f}" for name in names))
    worst = max(worst, *(abs(one[step][name] - two[step][name]) / one[step][name] for name in names))
print(f"largest relative difference {worst:.1e}")
if worst > 1e-6:  # the same sums in float32, whichever way gloo's messages travel
    sys.exit("error: two nodes give other losses than two ranks on one node")
print("Two nodes give the losses of two ranks on one node.")
EOF
