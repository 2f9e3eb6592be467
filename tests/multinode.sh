#!/usr/bin/env bash
# Two nodes on one machine, each a network namespace joined by a virtual cable (needs root and
# iproute2). Run by hand:   bash tests/multinode.sh [MODE] [PYTHON]
# Node 2 is killed in mid-run, agent and worker, and comes back with the same command line: the run
# must go on from its last checkpoint by itself, with the losses of a single process. Then it counts
# the bytes that one node sends per step, for docs/scale_out.md.
set -euo pipefail
mode=${1:-zero1} python=${2:-python}
here=$(cd "$(dirname "$0")/.." && pwd)
tmp=$(mktemp -d) net=sw$$- # names of its own: another run, or what one left, is none of ours
cleanup() {
    for i in 1 2; do
        for pid in $(ip netns pids $net$i 2>/dev/null); do kill -9 "$pid" 2>/dev/null || true; done
        ip netns del $net$i 2>/dev/null || true
    done
    rm -rf "$tmp"
}
trap cleanup EXIT

ip netns add ${net}1
ip netns add ${net}2
ip link add swveth1 netns ${net}1 type veth peer name swveth2 netns ${net}2
for i in 1 2; do
    ip -n $net$i addr add 10.77.0.$i/24 dev swveth$i
    ip -n $net$i link set swveth$i up
    ip -n $net$i link set lo up
done

"$python" - "$tmp" "$here" <<'PY'
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/tests"]
from test_train import make_data
make_data(Path(sys.argv[1]) / "data", train=4000, val=400)
PY
flags="--data_dir=$tmp/data --device=cpu --dtype=float32 --compile=false --block_size=32 --n_layer=2
 --n_head=2 --n_embd=16 --total_batch_tokens=256 --micro_batch=2 --val_tokens=224 --eval_every=0
 --sample_every=0 --checkpoint_every=10 --keep_checkpoints=2 --lr=3e-3 --warmup_steps=3 --print_every=10"
export OMP_NUM_THREADS=1
# torch 2.13's agents share a store whose address they tell only once: who comes back waits for it
# in vain, and after a minute all fail. This has them tell it anew each time.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

node() { # node I RUN FLAGS...: the line that a user types on node I
    local i=$1 run=$2
    shift 2
    # the two namespaces share a host name, so each is told its address and whether it is the host
    GLOO_SOCKET_IFNAME=swveth$i exec ip netns exec $net"$i" \
        "$python" -m torch.distributed.run --nnodes=2 --nproc_per_node=1 --max-restarts=3 \
        --rdzv_id=swtest-"$run" --rdzv_backend=c10d --rdzv_endpoint=10.77.0.1:29517 \
        --rdzv-conf=is_host=$((2 - i)),join_timeout=300 --local-addr=10.77.0.$i \
        "$here/train_gpt2.py" $flags --parallel=$mode --run_dir="$tmp/$run" "$@"
}

echo "single process"
"$python" "$here/train_gpt2.py" $flags --max_steps=300 --run_dir="$tmp/single" >"$tmp/single.out"

echo "two nodes, $mode; node 2 dies once a checkpoint is there"
node 1 killed --max_steps=300 >"$tmp/node1.out" 2>&1 &
first=$!
node 2 killed --max_steps=300 >"$tmp/node2.out" 2>&1 &
second=$!
for _ in $(seq 1200); do
    grep -q '"step": 45,' "$tmp/killed/log.jsonl" 2>/dev/null && break
    sleep 0.1
done
worker=$(pgrep -P $second || true)
kill -9 $second $worker
before=$(grep -c train_loss "$tmp/killed/log.jsonl")
echo "killed agent $second and worker $worker after step $before"
sleep 3
node 2 killed --max_steps=300 >"$tmp/node2again.out" 2>&1 &
wait $! || { tail -n 30 "$tmp/node2again.out" "$tmp/node1.out"; exit 1; }
wait $first || { tail -n 30 "$tmp/node1.out"; exit 1; }

"$python" - "$tmp" "$before" <<'PY'
import json, sys
from pathlib import Path
tmp, before = Path(sys.argv[1]), int(sys.argv[2])
read = lambda run: [json.loads(l) for l in (tmp / run / "log.jsonl").read_text().splitlines()]
loss = lambda run: {l["step"]: l["train_loss"] for l in read(run) if "train_loss" in l}
lines, a, b = read("killed"), loss("killed"), loss("single")
resumed = [l["step"] for l in lines if l.get("event") == "resume"]
worst = max(abs(a[s] - b[s]) for s in b)
print(f"resumed from step {resumed}; {before - resumed[0]} steps done again;",
      f"{len(a)} steps logged; largest difference to the single process {worst:.1e}")
assert resumed and before - resumed[0] <= 10 + 1 and a.keys() == b.keys() and worst < 1e-4
assert sum("train_loss" in l for l in lines) == 300  # every step once
PY

echo "bytes that one of two nodes sends per step in fp32, measured and by bytes_sent"
sent() { ip -n ${net}1 -s -j link show swveth1 | "$python" -c \
    'import json, sys; print(json.load(sys.stdin)[0]["stats64"]["tx"]["bytes"])'; }
for pair in "ddp adamw" "zero1 adamw" "fsdp adamw" "fsdp muon"; do
    read -r mode optimizer <<<"$pair"
    for steps in 5 15; do
        start=$(sent)
        more="--max_steps=$steps --checkpoint_every=0 --micro_batch=4 --n_layer=4 --n_embd=128 --optimizer=$optimizer"
        node 1 $mode-$optimizer-$steps $more >"$tmp/out1" 2>&1 & one=$!
        node 2 $mode-$optimizer-$steps $more >"$tmp/out2" 2>&1 & two=$!
        wait $one || { tail -n 30 "$tmp/out1"; exit 1; }
        wait $two
        declare bytes$steps=$(($(sent) - start))
    done
    "$python" - "$here" $mode $optimizer $(((bytes15 - bytes5) / 10)) <<'PY'
import sys
sys.path.insert(0, sys.argv[1])
from model import GPTConfig
from parallel import bytes_sent, largest_share, parameter_counts
config = GPTConfig(block_size=32, n_layer=4, n_head=2, n_embd=128)
mode, optimizer, measured = sys.argv[2], sys.argv[3], int(sys.argv[4])
computed = bytes_sent(config, mode, 2, width=4)
here = {  # what differs on the first rank, and under gloo
    "ddp": computed,
    "zero1": bytes_sent(config, "ddp", 2) + 4 * largest_share(config, 2),  # it has the embedding
    "fsdp": computed + 4 * parameter_counts(config)[0] // 2,  # scatters gradients by all-reduce
}[mode]
print(f"{mode:<6} {optimizer:<6} {measured:>12,} measured", end="")
if optimizer == "adamw":
    print(f" {computed:>12,} computed {here:>12,} for the first rank under gloo", end="")
    assert abs(measured / here - 1) < 0.01
print()
PY
done
echo passed
