#!/usr/bin/env bash
# What is pre-training worth? An answer from scratch, on two CPU cores, in under twelve minutes: shards of the Python documentation
# installed here, and a small BERT pre-trained from random weights with four enhanced decoders on two DeepSpeed ranks; a SIGTERM
# interrupts the run once, and the same command resumes it. Then three encoders get the same fine-tuning: random weights, masked
# language modelling (MLM) alone, and ours. The end is one table; the exit code is 1 if pre-training did not pay.
#   make demo        (or: OUTPUT=demo_run SEED=42 recipes/chains/demo.sh)
# The same command goes on with what is there: remove the folder to begin from nothing.
set -euo pipefail
. "$(dirname "$0")/stage.sh"
out=${OUTPUT:-demo_run} seed=${SEED:-42} interrupt_at=${INTERRUPT_AT:-300}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ranks="deepspeed --num_gpus 2 --master_port $((20000 + RANDOM % 10000))"     # other runs on this machine have their own port
shards=$out/shards pairs=$out/shards/pairs held_out=$out/shards/probe
texts=(--corpus "$pairs" --queries "$pairs")
asked=(--queries "$held_out" --qrels "$held_out/qrels/test.tsv" --depth 100)
pretraining=(--recipe demo --shards "$shards" --seed "$seed")
alone=(--tasks --task_weights None --tracking none)     # MLM alone
training=("${pretraining[@]}" --deepspeed ds_configs/zero2.json --probe "$held_out")

logged() { # RUN: the last step in its metrics
    sed -n 's/^{"step": \([0-9]*\), .*"kind": "train".*/\1/p' "$1/metrics.jsonl" 2> /dev/null | tail -n 1
}

interrupt() { # STEP RUN COMMAND...: a training that has not begun gets SIGTERM once STEP is logged, as a scheduler would send it
    local step=$1 run=$2 launcher
    if [ -n "$QUINCUNX_CHECK" ] || [ -e "$run/metrics.jsonl" ]; then return; fi
    printf '\n== %s\n' "${*:3}"
    "${@:3}" &
    launcher=$!
    until [ "$(logged "$run")" -ge "$step" ] 2> /dev/null; do
        if ! kill -0 $launcher 2> /dev/null; then wait $launcher; return; fi
        sleep 0.5
    done
    printf '\nStep %s: SIGTERM to the launcher.\n' "$(logged "$run")"
    kill -TERM $launcher
    wait $launcher || true
    flock "$run/run.lock" true     # granted when the last rank has let go of the run folder
    printf 'The ranks saved step %s. The same command again: it resumes from the checkpoint.\n' \
        "$(sed -n 's/^{"step": \([0-9]*\), .*"preempted".*/\1/p' "$run/metrics.jsonl" | tail -n 1)"
}

started=() logs=()
beside() { # NAME COMMAND...: runs beside others, into a log
    if [ -n "$QUINCUNX_CHECK" ]; then "${@:2}"; return; fi
    mkdir -p "$out/logs"
    printf '\n== %s > %s &\n' "${*:2}" "$out/logs/$1.log"
    "${@:2}" > "$out/logs/$1.log" 2>&1 &
    started+=($!) logs+=("$out/logs/$1.log")
}

all() { # waits for what runs beside; ends with the exit code of one that fails
    local number code
    for number in "${!started[@]}"; do
        code=0
        wait "${started[$number]}" || code=$?
        if [ $code -ne 0 ]; then tail -c 2000 "${logs[$number]}" >&2; exit $code; fi
    done
    started=() logs=()
}

stage build_shards --format python_docs --path stdlib --held_out_share 0.1 --probe_queries 1000 --pairs --tokenizer train:2048 \
    --max_tokens 64 --output "$shards"

interrupt "$interrupt_at" "$out/ours" $ranks "$launchers/pretrain.py" "${training[@]}" --output "$out/ours"
LAUNCH=$ranks train pretrain "${training[@]}" --output "$out/ours"
LAUNCH=$ranks train pretrain "${training[@]}" --output "$out/mlm" "${alone[@]}"     # a rival: the same steps
beside random stage pretrain "${pretraining[@]}" --output "$out/random" "${alone[@]}" --steps 0 --held_out_every 0 --probe None
beside bm25 stage search --method bm25 "${texts[@]}" --depth 50 --output "$out/bm25.train.trec"
all

stage mine --run "$out/bm25.train.trec" --qrels "$pairs/qrels/train.tsv" "${texts[@]}" --depth 50 --num_negatives 10 --random_fill 10 \
    --output "$out/negatives.jsonl"
for run in random mlm ours; do     # summary lines find their docstrings
    beside "$run.tuned" stage finetune --recipe demo --seed "$seed" --candidates "$out/negatives.jsonl" "${texts[@]}" \
        --encoder "$out/$run/export/encoder" --output "$out/$run.tuned"
done
all

# Held-out docstrings and their summary lines, which no training has seen. In float32: vectors of an encoder that has learned little
# are nearly alike, and float16 ranks them wrongly.
search() { # NAME MODEL
    stage encode --dtype float32 --corpus "$held_out" --model "$2" --output "$out/$1.vectors"
    stage search --model "$2" --embeddings "$out/$1.vectors" "${asked[@]}" --output "$out/$1.trec"
}
beside bm25.held_out stage search --method bm25 --corpus "$held_out" "${asked[@]}" --output "$out/bm25.trec"
for run in random mlm ours; do beside "$run.search" search "$run" "$out/$run.tuned/export/retriever"; done
beside untuned.search search untuned "$out/ours/export/encoder"
all
stage demo --output "$out"
