#!/usr/bin/env bash
# Run recipes with several seeds, one after another, and keep their result.json files:
#   studies/run_recipes.sh FOLDER_OF_PARQUET_FILES "0 1 2" cifar10-cnn cifar10-cnn-dense
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 seeds=$2
shift 2
for seed in $seeds; do
    for recipe in "$@"; do
        .venv/bin/gatewright train "$recipe" --seed "$seed" --output "runs/$recipe-$seed" --data.path "$data"
        # All but where this machine has the data, and where it tracked the run.
        grep -v '"tracking":' "runs/$recipe-$seed/result.json" | sed -e ':a;N;$!ba;s/,\n}/\n}/' -e "s#$data#FOLDER#g" > "studies/results/$recipe-$seed.json"
    done
done
