# What the chains share. A chain is a script of launchers: a stage that is there, made from the same files by the same settings,
# returns at once, so the same command goes on after a kill. CHECK=1 checks the settings of every stage and runs none.
#   stage NAME FLAGS...                 runs launchers/NAME.py
#   train NAME FLAGS...                 the same on all ranks: with $LAUNCH (default: python; deepspeed --num_gpus 8; srun python)
#   judge SYSTEM SPLIT                  measures $out/SYSTEM.SPLIT.trec
#   find_with SYSTEM SPLITS...          encodes $corpus with the retriever in $out/SYSTEM (or MODEL), searches and judges the splits
#   mine_with SYSTEM DEPTH FLAGS...     searches the training queries with a system that has encoded, and mines negatives
# A chain sets out, corpus, searching and encoding (flags), measures, and training for mine_with.
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
    local model=${MODEL:-$out/$1/export/retriever} split
    train encode --model "$model" --corpus "$corpus" "${encoding[@]}" --output "$out/$1.vectors"
    for split in "${@:2}"; do
        stage search --model "$model" --embeddings "$out/$1.vectors" --queries "$out/$split/queries.jsonl" \
            "${searching[@]}" --output "$out/$1.$split.trec"
        judge "$1" "$split"
    done
}

mine_with() {
    stage search --model "$out/$1/export/retriever" --embeddings "$out/$1.vectors" --queries "$out/train/queries.jsonl" \
        "${searching[@]}" --depth "$2" --output "$out/$1.train.trec"
    stage mine --run "$out/$1.train.trec" "${training[@]}" --qrels "$out/train/qrels.tsv" --depth "$2" "${@:3}" \
        --output "$out/$1.negatives.jsonl"
}
