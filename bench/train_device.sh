#!/usr/bin/env bash
# On a machine with a GPU: run the GPU tests and the benchmarks, train for a given time, write the report.
#
#   DATA=VOC2012 CONFIG=configs/voc_mit_b1.toml bash bench/train_device.sh OUT SECONDS
#
# OUT      folder of all results: check.txt, step_*.txt, energy.txt, crf.txt, predict.txt, run/, summary.txt
# SECONDS  time for training (default 600). A second call with the same OUT continues training exactly where it stopped,
#          and does not repeat the measurements that OUT holds.
# DATA     data set for the configuration; without it, the run learns the generated images of `afa demo`.
# EXTRA    further arguments of afa train, such as "--model.weights FOLDER --train.compile true".
# SKIP     names of measurements to leave out, such as "step_bf16_compiled", which compiles for minutes.
# PYTHON   interpreter with afa and its test dependencies (default: .venv/bin/python, else python3).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash bench/train_device.sh OUT [SECONDS]}
seconds=${2:-600}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD/src:$PWD/tests:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"

once() { # once FILE COMMAND...: run the command unless FILE exists; after a failure, print its last line
    local file="$out/$1"
    case " ${SKIP:-} " in *" ${1%.txt} "*) return 0 ;; esac
    shift
    [ -s "$file" ] && return 0
    echo "== $*"
    if "$@" >"$file.partial" 2>&1; then mv "$file.partial" "$file"; else
        echo "failed, see $file.partial: $(tail -1 "$file.partial")"
    fi
}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())' | tee "$out/device.txt"
once check.txt "$python" -m pytest -q -p no:cacheprovider -m gpu tests
setting=(--device cuda --backbone mit_b1 --crop 512 --batch 8 --phase all)
once step_fp32.txt "$python" bench/step.py "${setting[@]}" --precision fp32 --json "$out/step_fp32.json"
once step_bf16.txt "$python" bench/step.py "${setting[@]}" --precision bf16 --json "$out/step_bf16.json"
once energy.txt "$python" bench/energy.py --device cuda --step mit_b1
once crf.txt "$python" bench/crf.py --device cuda
once predict.txt "$python" bench/predict.py --device cuda
once step_bf16_compiled.txt "$python" bench/step.py "${setting[@]}" --precision bf16 --compile --json "$out/step_bf16_compiled.json"

# Ctrl-C lets a run finish its step and save, so it ends a run whose time is over.
if [ -n "${DATA:-}" ]; then
    job=(-m afa train --config "${CONFIG:-configs/voc_mit_b1.toml}" --data.root "$DATA" --out "$out/run" --resume --train.precision bf16)
else
    job=(-m afa demo --out "$out/run" --resume)
fi
# shellcheck disable=SC2086
timeout --signal=INT --kill-after=60 "$seconds" "$python" "${job[@]}" ${EXTRA:-} 2>&1 | tee -a "$out/train.txt" || true
"$python" -m afa report "$out/run" || true
{
    cat "$out/device.txt"
    for file in check step_fp32 step_bf16 step_bf16_compiled energy crf predict; do
        [ -s "$out/$file.txt" ] && echo "$file: $(tail -1 "$out/$file.txt")"
    done
    tail -1 "$out/train.txt"
} | tee "$out/summary.txt"
