#!/usr/bin/env bash
# Two versions of ninja that build in one folder in turn compile everything anew each time, although nothing has changed:
# each writes a build log of its own version, and starts over from the other's. PyTorch's extensions (DeepSpeed's operators
# among them) are built by the first ninja on the PATH, in one folder for all programs of a user: where the system has one and
# an environment another, a script that is run by its interpreter's path and one that is run in the activated environment
# wait for the compiler in turn, half a minute each for DeepSpeed's operator for the CPU.
#
# Seen with ninja 1.11.1 and 1.13.0 (PyPI), one file copied:
#   1.11.1  builds
#   1.11.1  no work to do
#   1.13.0  builds
#   1.11.1  builds
#   1.13.0  builds
#   1.13.0  no work to do
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 1.11.1 1.13.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet --disable-pip-version-check "ninja==$version"
done
mkdir "$work/build"
cd "$work/build"
echo text > source
printf 'rule copy\n  command = cp $in $out\nbuild target: copy source\n' > build.ninja
seen=""
for version in 1.11.1 1.11.1 1.13.0 1.11.1 1.13.0 1.13.0; do
    if "$work/$version/bin/ninja" | grep -q "no work to do"; then outcome="no work to do"; else outcome="builds"; fi
    echo "$version  $outcome"
    seen+="$outcome;"
done
[ "$seen" = "builds;no work to do;builds;builds;builds;no work to do;" ] || { echo "the behaviour has changed"; exit 1; }
