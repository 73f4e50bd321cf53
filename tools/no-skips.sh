#!/usr/bin/env bash
# Counts what `go test -json` ran, and fails when a test was skipped or none ran.
#
#   tools/no-skips.sh TEST.JSON...
set -euo pipefail

# count ACTION prints how many tests (not packages) ended that way.
count() { grep -h '"Test":' "${logs[@]}" | grep -c "\"Action\":\"$1\"" || true; }

logs=("$@")
passed=$(count pass)
failed=$(count fail)
skipped=$(count skip)
if ((skipped > 0)); then
	echo "skipped, which no test here may be:" >&2
	grep -h '"Test":' "${logs[@]}" | grep '"Action":"skip"' | sed 's/.*"Package":"\([^"]*\)","Test":"\([^"]*\)".*/  \1 \2/' >&2
fi
echo "$passed passed, $failed failed, $skipped skipped"
((passed > 0 && failed == 0 && skipped == 0))
