# What the chains share. A chain is a script of launchers: a stage that is there, made from the same files by the same settings,
# returns at once, so the same command goes on after a kill. CHECK=1 checks the settings of every stage and runs none.
#   stage NAME FLAGS...                 runs launchers/NAME.py
#   train NAME FLAGS...                 the same on all ranks: with $LAUNCH (default: python; deepspeed --num_gpus 8; srun python)
#   judge SYSTEM SPLIT                  measures $out/SYSTEM.SPLIT.trec
#   find_with SYSTEM MODEL CORPUS SPLITS...   encodes a corpus, then searches and judges splits of it
#   mine_with SYSTEM MODEL DEPTH FLAGS...     searches the training queries with a system that is encoded, and mines negatives
# A chain sets out, searching and encoding (flags), measures, and data for mine_with.
launchers=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../launchers" && pwd)
export QUINCUNX_CHECK=${CHECK:-}

stage() {
    printf '\n== %s\n' "$*"
    python "$launchers/$1.py" "${@:2}"
}

train() {
    printf '\n== %s\n' "$*"
    local launch=${LAUNCH:-python}
    [ -z "$QUINCUNX_CHECK" ] || launch=python
    $launch "$launchers/$1.py" "${@:2}"
}

judge() {
    stage evaluate --run "$out/$1.$2.trec" --qrels "$out/$2/qrels.tsv" "${measures[@]}" \
        --output "$out/$1.$2.json" --per_query "$out/$1.$2.jsonl"
}

find_with() {
    local system=$1 model=$2 corpus=$3 split
    train encode --model "$model" --corpus "$corpus" "${encoding[@]}" --output "$out/$system.vectors"
    for split in "${@:4}"; do
        stage search --model "$model" --embeddings "$out/$system.vectors" --queries "$out/$split/queries.jsonl" \
            "${searching[@]}" --output "$out/$system.$split.trec"
        judge "$system" "$split"
    done
}

mine_with() {
    local system=$1 model=$2 depth=$3
    stage search --model "$model" --embeddings "$out/$system.vectors" --queries "$out/train/queries.jsonl" \
        "${searching[@]}" --depth "$depth" --output "$out/$system.train.trec"
    stage mine --run "$out/$system.train.trec" "${training[@]}" --qrels "$out/train/qrels.tsv" --depth "$depth" "${@:4}" \
        --output "$out/$system.negatives.jsonl"
}
