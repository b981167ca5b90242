# shellcheck shell=bash
# shellcheck disable=SC2034  # variables are used by the scripts that source this
# What the scripts here share: options, checks, and one way to run a command. Sourced, never run.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=${NATIVEBIT_PROJECT:-} zone=${NATIVEBIT_ZONE:-} bucket=${NATIVEBIT_BUCKET:-} name=nativebit type=v6e-8 runtime='' poll=30
spot='' wait='' watch='' dry='' hosts='' args=()

die() { echo "error: $*" >&2; exit 1; }
help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; }
value() { [[ $# -ge 2 && -n $2 && $2 != --* ]] || die "$1 needs a value"; }

while [[ $# -gt 0 ]]; do
    case $1 in
        --project|--zone|--bucket|--name|--type|--runtime|--hosts|--poll) value "$@"; printf -v "${1#--}" %s "$2"; shift 2 ;;
        --spot|--wait|--watch) printf -v "${1#--}" %s yes; shift ;;
        --dry-run) dry=yes; shift ;;
        -h|--help) help ;;
        -*) die "unknown option $1; --help lists them" ;;
        *) args+=("$1"); shift ;;
    esac
done

[[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] || die "--name '$name' is not valid: lower-case letters, digits and hyphens, beginning with a letter"
[[ -z $bucket || $bucket =~ ^gs://[a-z0-9][-_.a-z0-9]+$ ]] || die "--bucket '$bucket' is not valid: give gs:// and its name"

# Before anything that a cloud is asked for: whose, and where.
need_cloud() {
    [[ -n $project ]] || die "no project: give --project or set NATIVEBIT_PROJECT"
    [[ -n $zone ]] || die "no zone: give --zone or set NATIVEBIT_ZONE"
    [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone '$zone' is not valid: give one such as us-east5-b"
    [[ -n $dry ]] || command -v gcloud > /dev/null || die "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
    at=(--project="$project" --zone="$zone")
}
need_bucket() { [[ -n $bucket ]] || die "no bucket: give --bucket gs://NAME or set NATIVEBIT_BUCKET; tpu_scripts/provision makes it"; }
need_args() { [[ ${#args[@]} -eq $1 ]] || die "$2"; }

say() { printf '%q ' "$@"; echo; }                           # a command as one could type it
run() { if [[ -n $dry ]]; then say "$@"; else "$@"; fi; }
ask() { [[ -z $dry ]] && "$@" 2> /dev/null; }                # a question; a dry run asks none
remote() { local worker=$1; shift; run gcloud compute tpus tpu-vm ssh "$name" "${at[@]}" --worker="$worker" --command="$*"; }
request_state() { ask gcloud compute tpus queued-resources describe "$name" "${at[@]}" --format='value(state.state)' || true; }
