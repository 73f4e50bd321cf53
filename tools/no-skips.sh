#!/usr/bin/env bash
# Counts what `go test -json` ran, and fails when a test was skipped, none ran, or one failed each time that it ran.
#
#   tools/no-skips.sh TEST.JSON...
set -euo pipefail

# tests ACTION prints the tests (not packages) that ended that way, a line each: PACKAGE TEST.
tests() { grep -h '"Test":' "${logs[@]}" | grep "\"Action\":\"$1\"" | sed 's/.*"Package":"\([^"]*\)","Test":"\([^"]*\)".*/  \1 \2/' | sort -u; }

logs=("$@")
passed=$(tests pass || true)
failed=$(tests fail || true)
skipped=$(tests skip || true)
again=$(comm -12 <(echo "$passed") <(echo "$failed"))
failed=$(comm -13 <(echo "$passed") <(echo "$failed"))
count() { grep -c . <<<"$1" || true; }
say() { # WHAT TESTS
	if [[ $2 ]]; then printf '%s:\n%s\n' "$1" "$2" >&2; fi
}
say 'skipped, which no test here may be' "$skipped"
say 'failed' "$failed"
say 'failed at first, passed when run again' "$again"
echo "$(count "$passed") passed, $(count "$failed") failed, $(count "$skipped") skipped"
[[ $passed && ! $failed && ! $skipped ]]
